"""`launch.doctor`: what it says of this machine, and of a device that computes wrongly."""

import importlib.metadata

import pytest

from launch import doctor


def test_what_it_says(capsys):
    doctor.run()
    said = capsys.readouterr().out
    for line in (f'versions: jaxsd .*jax {importlib.metadata.version("jax")}', 'device 0: cpu, ',
                 'compiled programs: ', 'extra serve: installed',
                 "extra tpu: missing libtpu: pip install 'jaxsd[tpu]'", 'self-check: passed, '):
        assert any(line.split('.*')[0] in one and line.split('.*')[-1] in one
                   for one in said.splitlines()), (line, said)


def test_a_device_that_computes_wrongly_is_an_error(monkeypatch):
    monkeypatch.setattr(doctor, 'EXPECTED', (211.0, 53.09))
    with pytest.raises(ValueError, match='gives a picture of mean 212.* expected 211.0 and 53.09'):
        doctor.run()
