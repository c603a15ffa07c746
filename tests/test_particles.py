import resource
import tracemalloc

import mrcfile
import numpy as np
import pytest
import torch

from cryoai.formats.mrc import read_map
from cryoai.formats.star import read_star
from cryoai.fourier import FourierDisc
from cryoai.optics import Optics
from cryoai.particle_stack import ParticleStack
from cryoai.particles import ParticleBatch, Quarantine, prepare_particles, stream_particles
from cryoai.poses import Poses, angular_distance_in_degrees, rotation_grid
from cryoai.simulation import protein_like_phantom, simulate
from stacks import (
    OPTICS,
    SHARED,
    correlations,
    needs_shared_data,
    particle_columns,
    plain_parse,
    refusal,
    third_party_particles,
    write_images,
    write_star,
)

BOX = 32
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.normal(size=(6, BOX, BOX)).astype(np.float32)


@pytest.fixture(scope="module")
def phantom():
    return protein_like_phantom(0)


@pytest.fixture(scope="module")
def noisy(phantom, tmp_path_factory):
    """300 particles at a signal-to-noise ratio of 0.1."""
    folder = tmp_path_factory.mktemp("noisy")
    options = {"n_particles": 300, "n_pixels": 64, "pixel_size_in_angstroms": 3.5, "snr": 0.1, "seed": 5}
    return simulate(phantom, folder, **options)


def stack_of(folder, images, **columns):
    write_images(folder / "images.mrcs", images)
    return ParticleStack.open(write_star(folder / "p.star", particle_columns(len(images)) | columns))


def first_rows(simulation, n, folder, transform=lambda images: images):
    """The first particles of a simulated stack, their images transformed."""
    with mrcfile.mmap(simulation.particles.parent / "particles.mrcs") as file:
        images = transform(np.array(file.data[:n]))
    write_images(folder / "particles.mrcs", images)
    rows = {name: cells[:n] for name, cells in plain_parse(simulation.particles)["particles"].items()}
    optics = plain_parse(simulation.particles)["optics"]
    return ParticleStack.open(write_star(folder / "particles.star", rows, optics))


# ------------------------------------------------------------------------------ opening


def test_images_come_in_the_order_asked_whatever_stack_they_are_in(tmp_path):
    write_images(tmp_path / "a.mrcs", NOISE[:4])
    write_images(tmp_path / "b.mrcs", NOISE[4:])
    names = ["2@b.mrcs", "4@a.mrcs", "1@a.mrcs", "1@b.mrcs", "2@a.mrcs"]
    stack = ParticleStack.open(write_star(tmp_path / "p.star", particle_columns(5) | {"rlnImageName": names}))
    assert (stack.n_particles, stack.n_pixels) == (5, BOX)
    found = stack.images(torch.tensor([4, 0, 2, 1, 0]))
    np.testing.assert_array_equal(found, NOISE[[1, 5, 0, 3, 5]])


def test_more_stacks_than_may_stay_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cryoai.particle_stack._OPEN_FILES", 2)
    names = [f"1@{write_images(tmp_path / f'{i}.mrcs', NOISE[i : i + 1]).name}" for i in range(6)]
    stack = ParticleStack.open(write_star(tmp_path / "p.star", particle_columns(6) | {"rlnImageName": names}))
    order = [3, 0, 5, 3, 1]
    np.testing.assert_array_equal(stack.images(torch.tensor(order)), NOISE[order])
    assert len(stack._open) == 2


@pytest.fixture
def at_most_256_open_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("at_most_256_open_files")
def test_hundreds_of_small_stacks_are_read_with_few_files_open(tmp_path):
    content = write_images(tmp_path / "0.mrcs", NOISE).read_bytes()
    for i in range(1, 400):
        (tmp_path / f"{i}.mrcs").write_bytes(content)
    names = [f"{i % 6 + 1}@{i}.mrcs" for i in range(400)]
    stack = ParticleStack.open(write_star(tmp_path / "p.star", particle_columns(400) | {"rlnImageName": names}))
    np.testing.assert_array_equal(stack.images(torch.arange(400)), NOISE[np.arange(400) % 6])
    assert prepare_particles(stack, BOX, tmp_path / "c.f16").n_particles == 400


def test_a_stack_of_more_than_four_gigabytes_is_read_to_its_last_image(tmp_path):
    n = 1_050_000
    path = write_images(tmp_path / "images.mrcs", NOISE[:1])
    with path.open("r+b") as raw:
        raw.seek(8)  # the number of images
        raw.write(n.to_bytes(4, "little"))
        # What was never written takes no place on the disk.
        raw.truncate(1024 + 4 * BOX * BOX * n)
        raw.seek(1024 + 4 * BOX * BOX * (n - 1))
        raw.write(NOISE[5].tobytes())
    assert path.stat().st_size > 2**32
    columns = particle_columns(2) | {"rlnImageName": ["1@images.mrcs", f"{n}@images.mrcs"]}
    stack = ParticleStack.open(write_star(tmp_path / "p.star", columns))
    np.testing.assert_array_equal(stack.images(torch.tensor([1, 0])), NOISE[[5, 0]])


def test_a_single_image_without_a_number_is_a_stack_of_one(tmp_path):
    with mrcfile.new(tmp_path / "one.mrc") as file:
        file.set_data(NOISE[0])
    stack = ParticleStack.open(
        write_star(tmp_path / "p.star", particle_columns(1, "x") | {"rlnImageName": ["one.mrc"]})
    )
    np.testing.assert_array_equal(stack.images(torch.tensor([0]))[0], NOISE[0])


@pytest.mark.parametrize("place", ["beside the file", "in the project's root", "in the data folder"])
def test_image_paths_are_found(tmp_path, place):
    star_folder, stacks, data_dir = {
        "beside the file": (tmp_path / "job", tmp_path / "job", None),
        "in the project's root": (tmp_path / "Refine3D" / "job007", tmp_path / "Extract", None),
        "in the data folder": (tmp_path / "job", tmp_path / "elsewhere" / "Extract", tmp_path / "elsewhere"),
    }[place]
    star_folder.mkdir(parents=True)
    stacks.mkdir(parents=True, exist_ok=True)
    write_images(stacks / "images.mrcs", NOISE)
    path = write_star(star_folder / "p.star", particle_columns(6, "Extract/images.mrcs"))
    np.testing.assert_array_equal(ParticleStack.open(path, data_dir=data_dir).images(torch.tensor([2]))[0], NOISE[2])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (NOISE[:2], "particle row 3 wants image 3 of {folder}/images.mrcs, which has 2; the two files do not belong"),
        (RANDOM.normal(size=(3, 33, 33)), "{folder}/images.mrcs: odd box of 33 pixels; an even box is needed"),
        (RANDOM.normal(size=(3, 32, 34)), "{folder}/images.mrcs: images of 34 x 32 pixels; crop them square"),
        (RANDOM.normal(size=(3, 30, 30)), "{folder}/images.mrcs: box of 30 pixels; at least 32 are needed"),
    ],
    ids=["beyond the stack", "odd", "not square", "small"],
)
def test_images_that_cannot_be_used_are_refused(tmp_path, images, message):
    write_images(tmp_path / "images.mrcs", images)
    path = write_star(tmp_path / "p.star", particle_columns(3))
    assert message.format(folder=tmp_path) in refusal(ParticleStack.open, path)


def test_a_missing_stack_is_named_with_the_flag_that_finds_it(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(2))
    message = refusal(ParticleStack.open, path)
    assert message.startswith(f"{path}: image stack images.mrcs not found; tried {tmp_path}/images.mrcs")
    assert "--data-dir" in message


def test_a_missing_data_folder_is_named(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(2))
    assert refusal(ParticleStack.open, path, data_dir=tmp_path / "x").startswith(
        f"--data-dir {tmp_path / 'x'}: no such"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_named_when_it_is_read(tmp_path, value):
    images = NOISE.copy()
    stack = stack_of(tmp_path, images)
    with mrcfile.mmap(tmp_path / "images.mrcs", mode="r+") as file:
        file.data[3, 5, 7] = value
    assert stack.images(torch.tensor([2, 4])).isfinite().all()
    message = refusal(stack.images, torch.tensor([2, 3]))
    image = f"4@{tmp_path}/images.mrcs"
    assert message == f"{stack.table.path}: row 4 ({image}) has values that are not finite; remove the row"


def test_poses_are_written_into_the_rows_they_belong_to(tmp_path):
    stack = stack_of(tmp_path, NOISE)
    poses = Poses(rotation_grid(6), torch.arange(12.0).reshape(6, 2))
    stack.write(tmp_path / "q.star", poses, {"cryoaiScore": np.arange(6)})
    again = ParticleStack.open(tmp_path / "q.star")
    assert angular_distance_in_degrees(again.poses.rotations, poses.rotations).max() < 0.05
    torch.testing.assert_close(again.poses.shifts_in_angstroms, poses.shifts_in_angstroms)
    assert again.table.images.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert plain_parse(again.table.path)["particles"]["cryoaiScore"] == ["0", "1", "2", "3", "4", "5"]
    assert stack.poses is None


# ------------------------------------------------------------------------------ working box


def test_noise_outside_the_particle_has_unit_variance_whatever_scale_the_images_have(noisy, tmp_path):
    gain = np.linspace(0.02, 50, 100, dtype=np.float32)[:, None, None]
    stack = first_rows(noisy, 100, tmp_path, lambda images: gain * images + 3)
    prepared = prepare_particles(stack, 64, tmp_path / "c.f16", sign=1)
    coefficients = prepared.batch(torch.arange(100)).coefficients
    images = prepared.disc.to_images(coefficients)
    r = torch.arange(64) - 32
    outside = (r[:, None] ** 2 + r**2) > (0.95 * 32) ** 2
    # The disc leaves out the corners of Fourier space: a fraction 1 - pi / 4 of the power of white noise.
    assert images[:, outside].var() == pytest.approx(np.pi / 4, rel=0.03)
    # At an SNR of 0.1, of which next to nothing lies in the outer shells, all of those are noise.
    outer = coefficients[:, prepared.disc.shells > 28]
    assert outer.abs().square().mean() == pytest.approx(1, rel=0.02)
    assert outer.abs().square().mean(1) == pytest.approx(np.ones(100), rel=0.3)


@pytest.mark.parametrize("contrast", [1, -1])
def test_the_sign_of_the_contrast_is_found_and_made_positive(noisy, tmp_path, contrast):
    stack = first_rows(noisy, 200, tmp_path, lambda images: contrast * images)
    prepared = prepare_particles(stack, 32, tmp_path / "c.f16")
    assert prepared.contrast.sign == contrast
    assert contrast * prepared.contrast.z_score > 3
    # Prepared, the images are those of bright protein.
    bright = ParticleStack.open(noisy.particles).images(torch.arange(200))
    images = prepared.disc.to_images(prepared.batch(torch.arange(200)).coefficients)
    assert correlations(images, prepared.disc.to_images(prepared.disc.from_images(bright))).min() > 0.99


@needs_shared_data
@pytest.mark.parametrize("snr", [10, 0.1])
def test_the_sign_of_a_large_particle_is_found_however_clear_the_images_are(tmp_path, snr):
    (tmp_path / "s").mkdir()
    ribosome = read_map(SHARED / "volumes" / "80S_4ug0_4A_80.mrc")
    made = simulate(
        ribosome, tmp_path / "s", n_particles=200, n_pixels=32, pixel_size_in_angstroms=11.0, snr=snr, seed=0
    )
    contrast = prepare_particles(ParticleStack.open(made.particles), 32, tmp_path / "c.f16").contrast
    assert contrast.sign == 1
    assert contrast.z_score > 5


@needs_shared_data
@pytest.mark.parametrize("box", ["64", "96"])
def test_real_protein_is_found_dark(tmp_path, box):
    stack = third_party_particles("betagal_empiar10061", f"betagal_101_box{box}.star")
    contrast = prepare_particles(stack, 32, tmp_path / "c.f16").contrast
    assert contrast.sign == -1
    assert contrast.z_score < -3


def test_a_forced_sign_is_obeyed(noisy, tmp_path):
    stack = first_rows(noisy, 200, tmp_path)
    positive = prepare_particles(stack, 32, tmp_path / "a.f16", sign=1)
    negative = prepare_particles(stack, 32, tmp_path / "b.f16", sign=-1)
    assert (positive.contrast.sign, negative.contrast.sign) == (1, -1)
    rows = torch.arange(200)
    torch.testing.assert_close(positive.batch(rows).coefficients, -negative.batch(rows).coefficients)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_image_is_named(tmp_path, value):
    images = NOISE.copy()
    images[3] = value
    message = refusal(prepare_particles, stack_of(tmp_path, images), BOX, tmp_path / "c.f16")
    assert f"too many images cannot be used: row 4 (4@{tmp_path}/images.mrcs) is constant; 0.0% of 6" in message


def test_a_smaller_working_box_is_the_beginning_of_a_larger_one(noisy, tmp_path):
    stack = first_rows(noisy, 20, tmp_path)
    rows = torch.arange(20)
    small = prepare_particles(stack, 40, tmp_path / "a.f16", sign=1)
    large = prepare_particles(stack, 64, tmp_path / "b.f16", sign=1)
    cropped = large.cropped(40)
    assert (small.n_pixels, cropped.n_pixels, large.n_pixels) == (40, 40, 64)
    assert small.pixel_size_in_angstroms == cropped.pixel_size_in_angstroms == pytest.approx(3.5 * 64 / 40)
    torch.testing.assert_close(
        small.optics.pixel_size_in_angstroms, cropped.optics.pixel_size_in_angstroms, rtol=1e-6, atol=0
    )
    p = FourierDisc.of_box(40).n_coefficients()
    # Half precision keeps eleven bits of either.
    torch.testing.assert_close(
        small.batch(rows).coefficients, large.batch(rows).coefficients[:, :p], rtol=2e-3, atol=1e-6
    )
    torch.testing.assert_close(cropped.batch(rows).coefficients, large.batch(rows).coefficients[:, :p], rtol=0, atol=0)
    assert small.batch(rows, max_radius=7).coefficients.shape[1] == small.imaging(7).n_coefficients


def test_two_pixel_sizes_are_brought_to_one_extent(phantom, tmp_path):
    # One seed gives the same particles, at 3.5 and at 4 A: 64 pixels of the first are 56 of the second.
    options = {"n_particles": 30, "n_pixels": 64, "snr": 1e6, "seed": 1, "shift_standard_deviation_in_angstroms": 4.0}
    parts = []
    for name, pixel_size in [("fine", 3.5), ("coarse", 4.0)]:
        (tmp_path / name).mkdir()
        parts.append(simulate(phantom, tmp_path / name, pixel_size_in_angstroms=pixel_size, **options))
    fine, coarse = (plain_parse(part.particles)["particles"] for part in parts)
    for columns, name, group in [(fine, "fine", "1"), (coarse, "coarse", "2")]:
        columns["rlnImageName"] = [cell.replace("@", f"@{name}/") for cell in columns["rlnImageName"]]
        columns["rlnOpticsGroup"] = [group] * 30
    optics = {name: cells * 2 for name, cells in OPTICS.items()}
    optics |= {"rlnOpticsGroup": [1, 2], "rlnImagePixelSize": [3.5, 4.0]}
    # One more of the first, to make it the more common.
    rows = {name: [*cells, *coarse[name], cells[0]] for name, cells in fine.items()}
    stack = ParticleStack.open(write_star(tmp_path / "p.star", rows, optics))
    assert stack.pixel_size_in_angstroms == 3.5

    prepared = prepare_particles(stack, 48, tmp_path / "c.f16", sign=1)
    torch.testing.assert_close(prepared.optics.pixel_size_in_angstroms, torch.full((61,), 3.5 * 64 / 48))
    batch = prepared.batch(torch.arange(61))
    images = prepared.disc.to_images(batch.coefficients)
    assert correlations(images[:30], images[30:60]).min() > 0.99
    assert correlations(images[:30], images[31:61]).max() < 0.95

    message = refusal(prepare_particles, stack, 60, tmp_path / "d.f16")
    assert "particle row 31 has pixels of 4 Å, too coarse for 60 pixels in 224 Å" in message
    assert "--box) of 56 or fewer" in message


def test_batches_keep_the_order_asked_and_their_optics(noisy, tmp_path):
    prepared = prepare_particles(first_rows(noisy, 30, tmp_path), 32, tmp_path / "c.f16")
    order = torch.tensor([29, 3, 3, 0, 17, 5, 11])
    batches = list(prepared.batches(order, 3, max_radius=9))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    everything = prepared.batch(torch.arange(30), max_radius=9)
    torch.testing.assert_close(torch.cat([batch.indices for batch in batches]), order)
    torch.testing.assert_close(torch.cat([batch.coefficients for batch in batches]), everything.coefficients[order])
    defocus = torch.cat([batch.optics.defocus_u_in_angstroms for batch in batches])
    written = np.array(read_star(tmp_path / "particles.star").defocus_u_in_angstroms)
    torch.testing.assert_close(defocus, torch.from_numpy(written).float()[order])


def test_chunks_leave_rows_in_their_places(tmp_path, monkeypatch):
    monkeypatch.setattr("cryoai.particles._CHUNK", 4)
    done = []
    stack = stack_of(tmp_path, NOISE)
    prepared = prepare_particles(stack, BOX, tmp_path / "c.f16", sign=-1, progress=done.append)
    assert done == [4, 6]
    monkeypatch.setattr("cryoai.particles._CHUNK", 256)
    at_once = prepare_particles(stack, BOX, tmp_path / "d.f16", sign=-1)
    rows = torch.arange(6)
    torch.testing.assert_close(prepared.batch(rows).coefficients, at_once.batch(rows).coefficients)
    correlation = correlations(prepared.disc.to_images(prepared.batch(rows).coefficients), -torch.from_numpy(NOISE))
    assert correlation.min() > 0.8


def test_a_batch_reads_its_own_rows_from_the_file_and_no_others(noisy, tmp_path):
    stack = ParticleStack.open(noisy.particles)
    prepared = prepare_particles(stack, 64, tmp_path / "c.f16")
    size = (tmp_path / "c.f16").stat().st_size
    assert size == 300 * 4 * prepared.disc.n_coefficients()
    tracemalloc.start()
    prepared.batch(torch.tensor([7, 250]), max_radius=5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 50
    # What is not in memory changes with the file.
    rows = np.memmap(prepared.path, dtype=np.float16, mode="r+").reshape(300, -1)
    rows[7] = 1
    rows.flush()
    assert (prepared.batch(torch.tensor([7])).coefficients == 1 + 1j).all()


# ------------------------------------------------------------------------------ streaming


def streamed(stack, n_pixels, batch_size=1000, sign=1, extent=None):
    """All batches of a stream, joined."""
    extent = extent or stack.n_pixels * stack.pixel_size_in_angstroms
    options = {
        "extent_in_angstroms": extent,
        "sign": sign,
        "batch_size": batch_size,
        "quarantine": Quarantine(stack, 0),
    }
    batches = list(stream_particles(stack, n_pixels, **options))
    indices, coefficients = (torch.cat([getattr(b, name) for b in batches]) for name in ("indices", "coefficients"))
    columns = zip(*(vars(batch.optics).values() for batch in batches), strict=True)
    return ParticleBatch(indices, coefficients, Optics(*map(torch.cat, columns))), [len(batch) for batch in batches]


@pytest.mark.parametrize("n_pixels", [64, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_stream_of_particles_is_what_preparing_them_would_store(noisy, tmp_path, n_pixels, sign):
    stack = first_rows(noisy, 50, tmp_path)
    stored = prepare_particles(stack, n_pixels, tmp_path / "c.f16", sign=sign).batch(torch.arange(50))
    found, _ = streamed(stack, n_pixels, sign=sign)
    # The file holds them in half precision; rounded like it they are the same to the last bit.
    assert torch.equal(torch.view_as_real(found.coefficients).half().float(), torch.view_as_real(stored.coefficients))
    assert torch.equal(found.indices, stored.indices)
    assert all(torch.equal(value, getattr(stored.optics, name)) for name, value in vars(found.optics).items())


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 20), (7, [7, 7, 6]), (20, [20]), (1000, [20])])
def test_every_particle_is_streamed_once_and_in_its_place_whatever_the_batch_size(noisy, tmp_path, batch_size, sizes):
    stack = first_rows(noisy, 20, tmp_path)
    found, found_sizes = streamed(stack, 32, batch_size)
    assert found_sizes == sizes
    assert found.indices.tolist() == list(range(20))
    disc = FourierDisc.of_box(32)
    expected = disc.from_images(stack.images(torch.arange(20)))
    assert correlations(disc.to_images(found.coefficients), disc.to_images(expected)).min() > 0.99
    torch.testing.assert_close(found.optics.defocus_u_in_angstroms, stack.optics.defocus_u_in_angstroms)


def assert_nearly_the_same_particles(found, expected):
    """All coefficients but the origin agree, up to what two estimates of one deviation differ by."""
    for one, other in zip(found.coefficients[:, 1:], expected.coefficients[:, 1:], strict=True):
        ratio = (one.conj() * other).real.sum() / one.abs().square().sum()
        assert float(ratio) == pytest.approx(1, abs=0.08)
        torch.testing.assert_close(ratio * one, other, atol=1e-3, rtol=0)
    for name, value in vars(found.optics).items():
        torch.testing.assert_close(value, getattr(expected.optics, name))


def test_of_a_larger_box_the_same_extent_is_streamed(tmp_path):
    large = np.random.default_rng(1).normal(size=(6, 80, 80)) + np.hanning(80)[:, None] * np.hanning(80)
    for name in ("large", "cut"):
        (tmp_path / name).mkdir()
    found, _ = streamed(stack_of(tmp_path / "large", large), 32, extent=64 * 3.0)
    expected, _ = streamed(stack_of(tmp_path / "cut", large[:, 8:72, 8:72]), 32)
    assert_nearly_the_same_particles(found, expected)


def test_finer_pixels_of_the_same_particles_give_the_same_coefficients(tmp_path):
    fine = np.random.default_rng(2).normal(size=(6, 128, 128)) + np.hanning(128)[:, None] * np.hanning(128)
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(fine, axes=(1, 2))), axes=(1, 2))[:, 32:96, 32:96]
    coarse = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(1, 2))).real, axes=(1, 2)) / 4
    stacks = []
    for pixel_size, images in ((1.5, fine), (3.0, coarse)):
        folder = tmp_path / str(pixel_size)
        folder.mkdir()
        write_images(folder / "images.mrcs", images)
        optics = OPTICS | {"rlnImagePixelSize": [pixel_size]}
        stacks.append(ParticleStack.open(write_star(folder / "p.star", particle_columns(6), optics)))
    found, expected = (streamed(stack, 32, extent=192.0)[0] for stack in stacks)
    assert_nearly_the_same_particles(found, expected)


def test_images_that_cannot_be_streamed_are_named(tmp_path):
    images = NOISE.copy()
    images[3] = 0.5
    stack = stack_of(tmp_path, images)
    assert f"row 4 (4@{tmp_path}/images.mrcs) is constant" in refusal(streamed, stack, BOX)
    assert "particle row 1 has pixels of 3 Å, too coarse for 32 pixels in 60 Å" in refusal(
        streamed, stack, BOX, extent=60.0
    )
    with mrcfile.mmap(tmp_path / "images.mrcs", mode="r+") as file:
        file.data[3, 5, 7] = np.nan
    assert "row 4 (4@" in refusal(streamed, stack, BOX)
    # Before it nothing is amiss, and it is not looked at before its turn.
    options = {"sign": 1, "batch_size": 3, "quarantine": Quarantine(stack, 0)}
    stream = stream_particles(stack, BOX, extent_in_angstroms=96.0, **options)
    assert next(stream).coefficients.isfinite().all()


def test_a_selection_of_particles_reads_their_images_and_names_their_rows_in_the_file(noisy, tmp_path):
    whole = ParticleStack.open(noisy.particles)
    rows = torch.tensor([250, 3, 77])
    taken = whole.take(rows)
    assert taken.n_particles == 3
    assert torch.equal(taken.images(torch.arange(3)), whole.images(rows))
    assert torch.equal(taken.optics.defocus_u_in_angstroms, whole.optics.defocus_u_in_angstroms[rows])
    taken.write(tmp_path / "taken.star", Poses(torch.eye(3).expand(3, 3, 3), torch.zeros(3, 2)), {})
    names = plain_parse(noisy.particles)["particles"]["rlnImageName"]
    assert list(plain_parse(tmp_path / "taken.star")["particles"]["rlnImageName"]) == [names[i] for i in rows.tolist()]


def test_a_bad_image_of_a_selection_is_named_by_its_row_in_the_file(tmp_path):
    stack = stack_of(tmp_path, NOISE)
    np.memmap(tmp_path / "images.mrcs", np.float32, "r+", offset=1024, shape=NOISE.shape)[4] = np.nan
    assert "row 5 (5@" in refusal(stack.take(torch.tensor([2, 4])).images, torch.tensor([1]))
