"""Files of adapters: every known key finds its layer, and what is wrong is said in one line."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from adapter_files import KOHYA, PEFT, attentions, draw, file, kohya, layers, lora, peft
from safetensors.numpy import save_file
from tiny import random_model, sparse_file

import jaxsd
from jaxsd.config_files import read_config
from jaxsd.weights import Model, adapter_names, adapters
from jaxsd.weights.files import open_tensors

HERE = pathlib.Path(__file__).resolve()
SHARED = HERE.parents[3] / 'shared' / 'manifests' / 'lora'  # the originals, if beside the clone
MANIFESTS = json.loads(gzip.decompress(
    (HERE.parents[1] / 'data' / 'manifests' / 'lora.json.gz').read_bytes()))
SPELLINGS = MANIFESTS.pop('spellings')


def version(name):
    return next(v for key, v in (('sdxl', 'sdxl'), ('sd21', 'sd21'), ('', 'sd15')) if key in name)


def test_copies_are_the_originals():
    if not SHARED.exists():
        pytest.skip('the original manifests are not beside this clone')
    for name, copy in MANIFESTS.items():
        path = next(SHARED.glob(f'{name}.json*'))
        raw = path.read_bytes()
        assert copy == json.loads(gzip.decompress(raw) if path.suffix == '.gz' else raw), name


@pytest.mark.slow
@pytest.mark.parametrize('name', MANIFESTS)
def test_every_key_of_a_manifest_is_a_layers_of_its_version(name, tmp_path):
    sparse_file(tmp_path / 'lora.safetensors', MANIFESTS[name])
    tensors = open_tensors(tmp_path / 'lora.safetensors')
    found = adapters.describe(tensors)
    assert found.version == version(name) and found.lacks == {}
    assert len(set(found.targets.values())) == found.fitting == len(found.layers)
    assert sum(map(len, found.layers.values())) == len(MANIFESTS[name])


@pytest.mark.parametrize('spelling', [s for s in SPELLINGS if s != 'LyCORIS suffixes'])
def test_every_spelling_of_a_layer(spelling):
    for key in SPELLINGS[spelling]:
        found = adapter_names.split(key)
        if '.base_layer.' in key:
            assert found is None
        else:
            part, layer = next(filter(None, (adapter_names.find(found[0], read_config(v))
                                             for v in ('sd15', 'sdxl'))))
            assert layer.endswith(('to_q', 'to_out.0', 'q_proj')) and found[1]
            assert ('text' in key or '_te' in key) == part.startswith('text_encoder')


@pytest.fixture(scope='module')
def model():
    return random_model('sd15')


@pytest.fixture
def save(tmp_path):
    def write(tensors, **metadata):
        save_file(tensors, tmp_path / 'lora.safetensors', metadata or None)
        return tmp_path / 'lora.safetensors'
    return write


def tensors_of(model, spelling=kohya, keys=KOHYA, make=lora, **settings):
    return file(model.config, spelling, keys, make, attentions(model.config), **settings)


def test_kohyas_metadata_and_alpha(model, save):
    adapter = jaxsd.load_adapter(save(tensors_of(model, alpha=1), ss_network_dim='3'), model)
    plain = jaxsd.load_adapter(save(tensors_of(model)), model)
    assert adapter.metadata == {'ss_network_dim': '3'}
    for part, deltas in plain.deltas.items():
        for name, delta in deltas.items():
            np.testing.assert_allclose(adapter.deltas[part][name].up, delta.up / 3, rtol=1e-6)


def test_pefts_folder(model, tmp_path):
    """PEFT keeps alpha in a file of its own."""
    tensors = {f'base_model.model.{key.removeprefix("unet.")}': value for key, value in
               tensors_of(model, peft, PEFT).items() if key.startswith('unet.')}
    save_file(tensors, tmp_path / 'adapter_model.safetensors')
    plain = jaxsd.load_adapter(tmp_path / 'adapter_model.safetensors', model)
    settings = {'lora_alpha': 6, 'alpha_pattern': {'attn2.to_q': 9}}
    (tmp_path / 'adapter_config.json').write_text(json.dumps(settings))
    scaled = jaxsd.load_adapter(tmp_path / 'adapter_model.safetensors', model)
    for name, delta in plain.deltas['unet'].items():
        factor = 3 if 'attn2.to_q' in name else 2
        np.testing.assert_allclose(scaled.deltas['unet'][name].up, factor * delta.up, rtol=1e-6)


def test_merging_keeps_dtypes(save):
    model = random_model('sd15', dtype='float16')
    adapter = jaxsd.load_adapter(save(tensors_of(model)), model)
    merged, before = jaxsd.merge(model, {adapter: 1}).params['unet'], model.params['unet']
    assert merged['conv_in']['weight'] is before['conv_in']['weight']
    new, old = (tree['mid_block']['attentions']['0']['transformer_blocks']['0']['attn1']['to_q']
                for tree in (merged, before))
    assert new['weight'].dtype == 'float16' and not np.array_equal(new['weight'], old['weight'])


@pytest.mark.parametrize('name, other, expected', [
    ('kohya_sdxl', 'sd15', 'is a LoRA for SDXL; this model is 1.x'),
    ('kohya_sd21', 'sd15', 'is a LoRA for 2.x; this model is 1.x'),
    ('lycoris_sd15_loha', 'sdxl', 'is a LoRA for 1.x; this model is SDXL'),
    ('kohya_sdxl', 'sdxl_refiner', "is a LoRA for SDXL; this model is SDXL's refiner"),
])
def test_files_for_another_version_name_it(name, other, expected, tmp_path):
    sparse_file(tmp_path / 'lora.safetensors', MANIFESTS[name])
    with pytest.raises(ValueError, match=expected) as error:
        jaxsd.load_adapter(tmp_path / 'lora.safetensors', Model(read_config(other), {}))
    assert '\n' not in str(error.value)


def test_unknown_keys_are_listed(model, save):
    tensors = tensors_of(model) | {'lora_te2_x.lora_down.weight': draw(np.random.default_rng(0), 2),
                                   'lora_te2_x.lora_up.weight': draw(np.random.default_rng(0), 2)}
    with pytest.raises(ValueError, match=r'1 of its \d+ layers .* lora_te2_x.lora_down.weight'):
        jaxsd.load_adapter(save(tensors), model)


def test_strays_are_left_out(model, save, caplog):
    rng, tensors = np.random.default_rng(0), tensors_of(model)
    plain = jaxsd.load_adapter(save(tensors), model)
    up = next(key for key in tensors if key.endswith('lora_up.weight'))
    strays = {'lora_te2_x.lora_down.weight': draw(rng, 2, 2),
              'lora_te2_x.lora_up.weight': draw(rng, 2, 2),
              'bundle_emb.a.clip_l_out': draw(rng, 1, 12),  # behind the text encoder: not known
              up: tensors[up][:-1]}
    with pytest.raises(ValueError, match=r'3 of its .* or strays=True'):
        jaxsd.load_adapter(save(tensors | strays), model)
    assert not caplog.text
    found = jaxsd.load_adapter(save(tensors | strays), model, strays=True)
    count = len(tensors) // 2
    assert f'left out, 3 of its {count + 2} layers' in caplog.text
    assert sum(map(len, found.deltas.values())) == count - 1 and not found.embeddings
    for part, deltas in found.deltas.items():
        for name, delta in deltas.items():
            np.testing.assert_array_equal(delta.up, plain.deltas[part][name].up)


def test_strays_alone_and_other_versions_stay_errors(model, save, tmp_path):
    with pytest.raises(ValueError, match='1 of its 1 layers are none .* expected a LoRA') as error:
        jaxsd.load_adapter(save({'lora_unet_x.diff': np.ones(1, 'f4')}), model, strays=True)
    assert 'strays=True' not in str(error.value)
    sparse_file(tmp_path / 'lora.safetensors', MANIFESTS['kohya_sdxl'])
    with pytest.raises(ValueError, match='is a LoRA for SDXL; this model is 1.x'):
        jaxsd.load_adapter(tmp_path / 'lora.safetensors', Model(read_config('sd15'), {}),
                           strays=True)


@pytest.mark.parametrize('version, keys', [
    ('sd15', {'string_to_param.*': 'text_encoder'}), ('sd15', {'emb_params': 'text_encoder'}),
    ('sdxl', {'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2'})])
def test_embeddings_inside(version, keys, save, caplog):
    """As OneTrainer bundles them; A1111 makes NAME a word of prompts."""
    model, rng = random_model(version), np.random.default_rng(1)
    arrays = {f'bundle_emb.{name}.{key}': draw(rng, 2, 12)
              for name in ('my.style', '<toy>') for key in keys}
    adapter = jaxsd.load_adapter(save(tensors_of(model) | arrays), model)
    assert set(adapter.embeddings) == {'my.style', 'toy'} and not caplog.text
    for key, part in keys.items():
        np.testing.assert_array_equal(adapter.embeddings['toy'].vectors[part],
                                      arrays[f'bundle_emb.<toy>.{key}'])
    assert adapter.embeddings['toy'].vectors.keys() == set(keys.values())
    mine = jaxsd.Embedding('toy', {})
    merged = jaxsd.merge(model.replace(embeddings={'toy': mine}), {adapter: 1}).embeddings
    assert merged == {'toy': mine, 'my.style': adapter.embeddings['my.style']}
    found = adapters.describe(open_tensors(save(tensors_of(model) | arrays)))
    assert sorted(found.embeddings) == ['my.style', 'toy']
    assert len(found.layers) == len(attentions(model.config))


def test_embeddings_inside_for_another_model(model, save):
    for width in (13, 768):
        inside = {'bundle_emb.a.emb_params': np.ones((1, width), np.float32)}
        with pytest.raises(ValueError, match=f"'bundle_emb.a.emb_params' have {width} numbers"):
            jaxsd.load_adapter(save(tensors_of(model) | inside), model)


@pytest.mark.parametrize('part', ['lora_down.weight', 'lora_up.weight'])
def test_ranks_that_disagree(part, model, save):
    tensors = tensors_of(model)
    key = next(key for key in tensors if key.endswith(part))
    layer = key.split('.')[0]
    tensors[key] = np.repeat(tensors[key], 2, int(part == 'lora_up.weight'))
    down, up = (list(tensors[f'{layer}.lora_{side}.weight'].shape) for side in ('down', 'up'))
    with pytest.raises(ValueError) as error:
        jaxsd.load_adapter(save(tensors), model, strays=True)
    said = str(error.value)
    assert f'the tensors of {layer} do not fit together' in said and '\n' not in said
    assert f'{layer}.lora_down.weight {down}' in said and f'{layer}.lora_up.weight {up}' in said


def test_values_that_the_models_dtype_cannot_hold(save):
    tensors = tensors_of(random_model('sd15'), alpha=3e5)
    assert jaxsd.load_adapter(save(tensors), random_model('sd15', 'float32')).deltas
    with pytest.raises(ValueError, match='adds is too large for float16; load the model in float3'):
        jaxsd.load_adapter(save(tensors), random_model('sd15', 'float16'))


def test_a_file_of_embeddings_alone(model, save):
    with pytest.raises(ValueError, match='1 tensors and no layers.*load_embedding reads'):
        jaxsd.load_adapter(save({'bundle_emb.a.emb_params': np.ones((1, 12), 'f4')}), model)


def broken(shapes, **others):
    rng = np.random.default_rng(0)
    return {part: draw(rng, *shape) for part, shape in {**shapes, **others}.items()}


LOHA = {'hada_w1_a': (12, 3), 'hada_w1_b': (3, 12), 'hada_w2_a': (12, 3), 'hada_w2_b': (3, 12)}
LOKR = {'lokr_w1': (3, 3), 'lokr_w2_a': (4, 2), 'lokr_w2_b': (2, 4)}
GLORA = {'a1.weight': (12, 2), 'a2.weight': (2, 12), 'b1.weight': (12, 2), 'b2.weight': (2, 12)}


@pytest.mark.parametrize('parts', [
    broken(LOHA, hada_w1_b=(4, 12)), broken(LOHA, hada_w2_a=(12, 4)), broken(LOHA, alpha=(3,)),
    broken(LOKR, lokr_w2_b=(3, 4)), broken(GLORA, **{'a2.weight': (3, 12)}),
    broken(GLORA, **{'b1.weight': (12, 3)}), broken({'oft_blocks': (3, 4, 5)}),
    broken({'lora_up.weight': (12, 3), 'lora_down.weight': (3, 12), 'alpha': (12, 1)}),
    broken({'lora_up.weight': (12, 0), 'lora_down.weight': (0, 12)}),
    broken({'lora_up.weight': (12, 3), 'lora_down.weight': (3, 12), 'dora_scale': (7, 1)}),
    broken({'weight': (5,), 'on_input': (1,)}), broken(LOHA, hada_w2_b=(3, 7))])
def test_sizes_that_disagree_in_every_format(parts, model, save):
    layer = 'lora_te_text_model_encoder_layers_0_self_attn_q_proj'
    with pytest.raises(ValueError, match=f'the tensors of {layer} do not fit together') as error:
        jaxsd.load_adapter(save({f'{layer}.{part}': a for part, a in parts.items()}), model)
    said = str(error.value)
    assert '\n' not in said and all(f'{layer}.{part} {list(a.shape)}' in said
                                    for part, a in parts.items())


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('part', ['lora_down.weight', 'lora_up.weight', 'alpha'])
def test_values_that_are_not_finite(part, bad, model, save):
    tensors = tensors_of(model, alpha=1)
    key = next(key for key in tensors if key.endswith(part))
    tensors[key].reshape(-1)[-1:] = bad
    with pytest.raises(ValueError, match=f'{key} has values that are not finite'):
        jaxsd.load_adapter(save(tensors), model)


def test_half_a_pair_is_named(model, save):
    tensors = tensors_of(model)
    lost = next(key for key in tensors if key.endswith('lora_up.weight'))
    del tensors[lost]
    with pytest.raises(ValueError, match=f'{lost.split(".")[0]} .*no up; the file is incomplete'):
        jaxsd.load_adapter(save(tensors), model)


def test_an_incomplete_file_is_described(model, save):
    tensors = tensors_of(model)
    lost = next(key for key in tensors if key.endswith('lora_up.weight'))
    del tensors[lost]
    found = adapters.describe(open_tensors(save(tensors)))
    assert found.lacks == {lost.split('.')[0]: 'up'} and found.lacks.keys() <= found.targets.keys()


@pytest.mark.parametrize('bad', ['a\nb', '\x1b[31m.lora_up.weight', 'a\u2028b.lora_down.weight'])
def test_names_of_several_lines_are_shown_in_one(bad, model, save):
    with pytest.raises(ValueError, match='\N{REPLACEMENT CHARACTER}') as error:
        jaxsd.load_adapter(save(tensors_of(model) | {bad: np.zeros(1, np.float32)}), model)
    assert str(error.value).isprintable()


def test_settings_that_are_none(model, save):
    with pytest.raises(ValueError, match="PEFT's settings .* no JSON object"):
        jaxsd.load_adapter(save(tensors_of(model), lora_adapter_metadata='[1'), model)


def test_other_files_are_named(model, save):
    with pytest.raises(ValueError, match='is a VAE, by its tensor .* expected a LoRA'):
        jaxsd.load_adapter(save({'encoder.conv_in.weight': np.zeros((1, 1), np.float32)}), model)


def test_a_layer_of_other_sizes_is_listed(model, save):
    tensors = tensors_of(model)
    key = next(key for key in tensors if key.endswith('lora_up.weight'))
    tensors[key] = tensors[key][:-1]
    with pytest.raises(ValueError, match=f'1 of its .*{key.split(".")[0]}'):
        jaxsd.load_adapter(save(tensors), model)


def test_every_layer_can_be_adapted(model, save):
    tensors = file(model.config, kohya, KOHYA, lora, layers(model.config))
    adapter = jaxsd.load_adapter(save(tensors), model)
    assert sum(map(len, adapter.deltas.values())) == len(layers(model.config))
