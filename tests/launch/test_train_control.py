"""The ControlNet's training: what it sees, and a run, taken up again, and its export."""

import numpy as np
import pytest

import jaxsd
from configs.train_emoji_edges import get_config
from launch import train_control


@pytest.fixture
def recipe(tmp_path, checkpoint):
    """The shipped recipe for a tiny model and a data set of dark squares, two of them unseen."""
    c = get_config()
    c.update(data=str(tmp_path / 'data.npz'), model=str(checkpoint), out=str(tmp_path / 'run'),
             export=str(tmp_path / 'edges'), unseen=str(tmp_path / 'unseen.txt'))
    c.controlnet.conditioning_embedding_out_channels = (4, 4, 8, 8)
    c.stages.control.update(steps=2, batch_size=4, save_every=2, log_every=1, warmup=1)
    images = np.full((6, 64, 64, 3), 255, np.uint8)
    for i, image in enumerate(images):
        image[8 + i:56 - i, 8:56] = 40
    np.savez(c.data, images=images, plain=np.arange(6) % 2 == 0, heldout=np.arange(6) == 5,
             captions=np.array(['cat', 'cat: dark', 'dog', 'dog: dark', 'catfish', 'dogfish']))
    (tmp_path / 'unseen.txt').write_text('cat\n')
    return c


def test_what_is_seen(recipe):
    images, captions, edges, weights = train_control.examples(recipe)
    assert images.shape == edges.shape == (18, 64, 64, 3)
    assert captions.tolist() == captions[:6].tolist() * 3
    # The unseen caption, its tones and what the model never saw are hidden, a longer word is not;
    # the glyph itself comes four times as often as each of its smaller copies.
    once = np.array([0, 0, 3, 1, 3, 0])
    np.testing.assert_array_equal(weights, [*(4 * once), *once, *once])
    for image, drawn in zip(images, edges):
        dark = np.argwhere(image[..., 0] < 150)
        for line in np.argwhere(drawn[..., 0]):  # every edge lies at the border of the square
            assert np.abs(dark - line).max(1).min() <= 1
        assert set(np.unique(drawn)) == {0, 255} and (image[0] == 255).all()
    assert (np.count_nonzero(images[6:, ..., 0] < 150, (1, 2))
            < np.count_nonzero(np.tile(images[:6], (2, 1, 1, 1))[..., 0] < 150, (1, 2))).all()


@pytest.mark.slow
def test_trained_and_taken_up_again(recipe, tmp_path):
    for _ in range(2):  # the second time nothing is left to do but to write the export
        train_control.train(recipe)
        folder = tmp_path / 'run' / 'control'
        log = (folder / 'log.csv').read_text().splitlines()
        assert [line.split(',')[0] for line in log] == ['step', '1', '2']
        assert {'state.safetensors', 'curve.png', '000002.png'} <= {
            file.name for file in folder.iterdir()}
        net = jaxsd.load_controlnet(recipe.export)
        (tmp_path / 'edges' / 'diffusion_pytorch_model.safetensors').unlink()

    assert net.config.conditioning_embedding_out_channels == (4, 4, 8, 8)
    assert all(np.any(p['weight']) for p in net.params['controlnet_down_blocks'].values())
