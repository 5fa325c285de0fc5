"""Networks that enlarge pictures, and that restore faces, against spandrel's, by files in all
their names."""

import importlib
import importlib.util
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import torch

import jaxsd
from jaxsd.config import CodeFormerConfig, GFPGANConfig
from jaxsd.models import codeformer, gfpgan, upscaler

pytestmark = pytest.mark.parity
SPEC = importlib.util.find_spec('spandrel')
EXTRA = importlib.util.find_spec('spandrel_extra_arches')


@pytest.fixture(scope='module')
def spandrel():
    """spandrel's architectures by name, without the package around them, which needs
    torchvision."""
    if SPEC is None:
        pytest.skip('spandrel is not installed: make parity installs it')
    root = pathlib.Path(SPEC.origin).parent
    fakes = {}
    for name in ('spandrel', 'spandrel.architectures'):
        fakes[name] = types.ModuleType(name)
        fakes[name].__path__ = [str(root / name.partition('.')[2])]
    sys.modules.update(fakes)
    try:
        yield lambda name: importlib.import_module(f'spandrel.architectures.{name}')
    finally:
        for name in [name for name in sys.modules if name.split('.')[0] == 'spandrel']:
            del sys.modules[name]


RRDB = dict(num_filters=16, num_blocks=2)
SWIN = dict(embed_dim=24, depths=[2, 2], num_heads=[2, 3], window_size=8, img_size=16, mlp_ratio=2)
CASES = {
    'ESRGAN x4': ('ESRGAN', dict(RRDB)),
    'ESRGAN x2': ('ESRGAN', dict(RRDB, scale=2)),
    'ESRGAN x1': ('ESRGAN', dict(RRDB, scale=1)),
    'Real-ESRGAN x2': ('ESRGAN', dict(RRDB, in_nc=12, shuffle_factor=2)),
    'Compact x4': ('Compact', dict(num_feat=16, num_conv=3)),
    'Compact x2': ('Compact', dict(num_feat=8, num_conv=2, upscale=2)),
    'SwinIR classical x4': ('SwinIR', dict(SWIN, upsampler='pixelshuffle', upscale=4)),
    'SwinIR classical x3': ('SwinIR', dict(SWIN, upsampler='pixelshuffle', upscale=3)),
    'SwinIR light x2': ('SwinIR', dict(SWIN, upsampler='pixelshuffledirect', upscale=2)),
    'SwinIR real x4': ('SwinIR', dict(SWIN, upsampler='nearest+conv', upscale=4,
                                      resi_connection='3conv')),
    'SwinIR denoising': ('SwinIR', dict(SWIN)),
    'SwinIR JPEG': ('SwinIR', dict(SWIN, window_size=7, img_size=21)),
}


def made(spandrel, case):
    """A random network of a case."""
    kind, options = CASES[case]
    torch.manual_seed(0)
    module = getattr(spandrel(kind), kind)(**options).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # biases and tables are 0 at first
            parameter += 0.05 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize('case', CASES)
def test_network(case, spandrel, tmp_path):
    """Also of sides that are no multiples of windows or of what is read as channels."""
    module = made(spandrel, case)
    torch.save(module.state_dict(), tmp_path / 'a.pth')
    network = jaxsd.load_upscaler(tmp_path / 'a.pth')
    described = getattr(spandrel(CASES[case][0]), f'{CASES[case][0]}Arch')().load(
        dict(module.state_dict()))
    assert network.config.scale == described.scale
    image = np.random.default_rng(0).random((2, 26, 35, 3), np.float32)
    with torch.no_grad():
        expected = described.model.eval()(torch.tensor(image).permute(0, 3, 1, 2))
    expected = expected.permute(0, 2, 3, 1)
    found = jax.jit(upscaler.apply, static_argnums=1)(network.params, network.config, image)
    assert found.shape == expected.shape
    assert np.abs(found - expected.numpy()).max() < 1e-5 * np.abs(expected.numpy()).max()


RENAMES = {
    'Real-ESRGAN': lambda name, rest: {
        'model.0': 'conv_first', 'model.1.sub.2': 'conv_body', 'model.3': 'conv_up1',
        'model.6': 'conv_up2', 'model.8': 'conv_hr', 'model.10': 'conv_last'}.get(
            name, name.replace('model.1.sub', 'body').replace('RDB', 'rdb').removesuffix('.0')),
    'BSRGAN': lambda name, rest: {
        'model.0': 'conv_first', 'model.1.sub.2': 'trunk_conv', 'model.3': 'upconv1',
        'model.6': 'upconv2', 'model.8': 'HRconv', 'model.10': 'conv_last'}.get(
            name, name.replace('model.1.sub', 'RRDB_trunk').removesuffix('.0')),
}


@pytest.mark.parametrize('spelling', RENAMES)
@pytest.mark.parametrize('wrapped', ['params_ema', 'params', None])
def test_names(spelling, wrapped, spandrel, tmp_path):
    """The same network in the names of other programs, and the averaged weights of two."""
    module = made(spandrel, 'ESRGAN x4')
    torch.save(module.state_dict(), tmp_path / 'a.pth')
    first = jaxsd.load_upscaler(tmp_path / 'a.pth')
    tensors = {}
    for name, array in module.state_dict().items():
        layer, _, kind = name.rpartition('.')
        tensors[f'{RENAMES[spelling](layer, kind)}.{kind}'] = array
    whole = {wrapped: tensors} if wrapped else tensors
    if wrapped == 'params_ema':
        whole['params'] = {name: 0 * array for name, array in tensors.items()}
    torch.save(whole, tmp_path / 'b.pth')
    second = jaxsd.load_upscaler(tmp_path / 'b.pth')
    assert first.config == second.config
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_face_restorer(spandrel, tmp_path):
    """GFPGAN of 64 pixels, with the noise that its file holds; spandrel draws it anew."""
    torch.manual_seed(0)
    module = spandrel('GFPGAN').GFPGAN(out_size=64, num_style_feat=12, narrow=1 / 32).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # biases and strengths of noise are 0 at first
            parameter += 0.05 * torch.randn_like(parameter)
    torch.save({'params_ema': module.state_dict()}, tmp_path / 'GFPGANv1.4.pth')
    network = jaxsd.load_face_restorer(tmp_path / 'GFPGANv1.4.pth')
    assert network.config == GFPGANConfig((8, 8, 8, 8, 8), 12) and network.config.size == 64
    image = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype('f4')
    x = torch.tensor(image).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        expected, drawn = (module(x, randomize_noise=new)[0].permute(0, 2, 3, 1).numpy()
                           for new in (False, True))
    found = jax.jit(gfpgan.apply, static_argnums=1)(network.params, network.config, image)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected - drawn).max() > 1e-3 * np.abs(expected).max()  # so the noise counts


def test_released_face_restorer(spandrel):
    """Names and shapes of the released files, of 512 pixels, but for what training needed."""
    with torch.device('meta'):
        module = spandrel('GFPGAN').GFPGAN()
    stored = {name: tuple(array.shape) for name, array in module.state_dict().items()}
    found = gfpgan.renamed(stored)
    assert gfpgan.names(GFPGANConfig()) == {name: stored[name] for name in found}
    assert gfpgan.config_of(stored) == GFPGANConfig()
    assert GFPGANConfig().size == 512 and len(stored) - len(found) == 2 * 8 + 2 * 7


@pytest.fixture
def former(spandrel):
    """The module with CodeFormer's classes."""
    if EXTRA is None:
        pytest.skip('spandrel_extra_arches is not installed: make parity installs it')
    path = pathlib.Path(EXTRA.origin).parent / 'architectures/CodeFormer/__arch/codeformer.py'
    spandrel('GFPGAN')  # brings spandrel.util
    spec = importlib.util.spec_from_file_location('codeformer', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_codeformer(former, tmp_path, monkeypatch):
    """CodeFormer of 64 pixels, whose places are 16 x 16 as those of the released one."""
    torch.manual_seed(0)
    whole = former.VQAutoEncoder.__init__
    monkeypatch.setattr(former.VQAutoEncoder, '__init__', lambda self, *_: whole(
        self, 64, 32, [1, 2, 2], 'nearest', 2, [16], 24))
    module = former.CodeFormer(dim_embd=32, n_layers=2, codebook_size=24, connect_list=[]).eval()
    module.connect_list = ['32', '64']
    module.fuse_encoder_block = {'64': 2, '32': 5}
    module.fuse_generator_block = {'32': 9, '64': 12}
    module.fuse_convs_dict = torch.nn.ModuleDict({
        size: former.Fuse_sft_block(width, width) for size, width in (('32', 64), ('64', 32))})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    torch.save({'params_ema': module.state_dict()}, tmp_path / 'codeformer.pth')
    network = jaxsd.load_face_restorer(tmp_path / 'codeformer.pth')
    assert network.config == CodeFormerConfig((32, 64, 64), 256, 24, 32, 2, 8, 16, (32, 64))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype('f4')
    x = torch.tensor(image).permute(0, 3, 1, 2).contiguous()
    program = jax.jit(codeformer.apply, static_argnums=1)
    for weight in (0.0, 0.7):
        with torch.no_grad():
            expected = module(x, weight=weight)[0].permute(0, 2, 3, 1).numpy()
        found = program(network.params, network.config, image, weight)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_released_codeformer(former):
    """Names and shapes of the released file."""
    with torch.device('meta'):
        module = former.CodeFormer()
    stored = {name: tuple(array.shape) for name, array in module.state_dict().items()}
    found = codeformer.renamed(stored)
    assert codeformer.names(CodeFormerConfig()) == {new: stored[old] for new, old in found.items()}
    assert codeformer.config_of({new: stored[old] for new, old in found.items()}
                                ) == CodeFormerConfig()
    assert CodeFormerConfig().size == 512
