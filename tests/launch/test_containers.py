"""The image and the manifests that run it, as hadolint, Kubernetes' schemas and our commands see
them."""

import pathlib
import subprocess
import sysconfig

import kubernetes_validate
import pytest
import yaml
from mains import ROOT, run_main

MANIFESTS = ('kubernetes', 'ray')


def documents(name):
    return [*yaml.safe_load_all((ROOT / 'launch' / f'{name}.yaml').read_text())]


def core(document):
    """What Kubernetes itself knows of a document: a JobSet's jobs, a RayJob's pods."""
    named = {'metadata': document['metadata']}
    if document['kind'] == 'JobSet':
        return [{'apiVersion': 'batch/v1', 'kind': 'Job', **named, **jobs['template']}
                for jobs in document['spec']['replicatedJobs']]
    if document['kind'] == 'RayJob':
        cluster = document['spec']['rayClusterSpec']
        return [{'apiVersion': 'v1', 'kind': 'PodTemplate', **named, 'template': group['template']}
                for group in (cluster['headGroupSpec'], *cluster['workerGroupSpecs'])]
    return [document]


def test_the_dockerfile_is_clean():
    hadolint = pathlib.Path(sysconfig.get_path('scripts')) / 'hadolint'
    done = subprocess.run([hadolint, ROOT / 'Dockerfile'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('name', MANIFESTS)
def test_manifests_are_valid(name):
    found = [part for document in documents(name) for part in core(document)]
    assert len(found) >= 2
    for part in found:
        kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize('name', MANIFESTS)
def test_commands_of_manifests_are_ours(name):
    spec = documents(name)[-1]['spec']
    if name == 'ray':
        entrypoint, *command = spec['entrypoint'].split()
        assert entrypoint == 'jaxsd'
    else:
        pod = spec['replicatedJobs'][0]['template']['spec']['template']['spec']
        command = pod['containers'][0]['args']
    code = ('import importlib, sys; from launch import generate\n'
            "importlib.import_module(f'launch.{sys.argv[1]}').define_flags()\n"
            'generate.parse(sys.argv[1:])')
    status, _, error = run_main('-c', code, *command)
    assert status == 0, error
