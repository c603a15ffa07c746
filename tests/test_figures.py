import struct

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryoai.formats.mrc import MrcMap
from cryoai.report.figures import draw_particles_and_map, render_surface
from stacks import files_in

RANDOM = np.random.default_rng(0)


def png_size(path):
    start = path.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", start[16:24])


def images(n):
    return RANDOM.normal(size=(n, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("n_images", [1, 12, 15])
def test_a_picture_of_particles_and_map_is_drawn(phantom, tmp_path, n_images):
    density = MrcMap(phantom.density(32).float().numpy(), 3.0)
    path = tmp_path / "picture.png"
    draw_particles_and_map(path, images(n_images), density, "a title")
    width, height = png_size(path)
    assert 1000 < width < 3000
    assert 400 < height < 1500
    assert path.stat().st_size > 20_000
    assert files_in(tmp_path) == ["picture.png"]


def test_a_map_of_noise_can_be_drawn(tmp_path):
    density = MrcMap(RANDOM.normal(size=(24, 24, 24)).astype(np.float32), 3.0)
    draw_particles_and_map(tmp_path / "picture.png", images(3), density, "noise")
    assert png_size(tmp_path / "picture.png")[0] > 1000


def test_a_flat_map_is_drawn_as_nothing(tmp_path):
    picture = render_surface(np.zeros((24, 24, 24), dtype=np.float32), Rotation.identity(), n_pixels=40)
    assert np.isfinite(picture).all()
    assert (picture[..., 3] == 0).all()
    density = MrcMap(np.zeros((24, 24, 24), dtype=np.float32), 3.0)
    draw_particles_and_map(tmp_path / "picture.png", images(3), density, "nothing")
    assert png_size(tmp_path / "picture.png")[0] > 1000


def test_the_surface_is_drawn_where_the_matter_is():
    # A ball a quarter of the box along x from the centre.
    axis = np.arange(32) - 16
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    ball = np.exp(-((x - 8) ** 2 + y**2 + z**2) / 8).astype(np.float32)
    n = 60
    # Seen from the front, and after a turn about z and about y.
    for turn, seen in (((0, 0, 0), (20, 0)), ((0, 0, 90), (0, 20)), ((0, 90, 0), (0, 0))):
        picture = render_surface(ball, Rotation.from_euler("xyz", turn, degrees=True), n_pixels=n)
        assert picture.shape == (n, n, 4)
        assert picture.min() >= 0
        assert picture.max() <= 1
        rows, columns = np.nonzero(picture[..., 3])
        # 8 voxels of the 24 that are shown are a third of the picture.
        assert abs(abs(columns.mean() - n // 2) - seen[0]) < 2
        assert abs(abs(rows.mean() - n // 2) - seen[1]) < 2
        assert len(rows) < 0.2 * n**2
