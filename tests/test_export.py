"""Particles of a run for RELION and cryoSPARC: what they read in the files must give the map of the run."""

import csv
import json
import pickle
import shutil

import mrcfile
import numpy as np
import pytest
import torch

import cryoai.export
import cryoai.read_back
from cryoai.errors import RunFailedError
from cryoai.export import export_run
from cryoai.formats.mrc import MrcMap, read_map
from cryoai.formats.table import PoseColumns
from cryoai.fourier import fourier_shell_correlation, n_shells_above, resize_map, soft_sphere
from cryoai.half_maps import HalfMaps
from cryoai.particle_stack import Fault, ParticleStack
from cryoai.particles import prepare_particles
from cryoai.pose_files import read_poses
from cryoai.reconstruction import HalfSets
from cryoai.runs import RunFolder
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.symmetry.averaging import symmetrized_half_sets, symmetrized_map
from cryoai.symmetry.groups import PointGroup
from cryoai.training.loop import reconstruct
from cryoai.training.settings import Settings
from oracles import textbook_ctf
from stacks import files_in, needs_relion, plain_parse, refusal, run_relion, write_images, write_star

pytestmark = pytest.mark.slow

# The images are larger than the working box, and their pixels finer.
N, SIZE, BOX, PIXEL = 600, 48, 32, 4.5
SETTINGS = {
    "stages": ("bootstrap", "refinement"),
    "box": BOX,
    "device": "cpu",
    "bootstrap": {"n_steps": 40, "batch_size": 100, "n_rotations": 2304, "n_starts": 1, "max_starts": 1},
    "placement": {"n_rotations": 2304},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder of RELION's kind: a STAR file whose image names start from it, and a finished run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("project")
    (folder / "Extract").mkdir()
    simulate(
        protein_like_phantom(0),
        folder / "Extract",
        n_particles=N,
        n_pixels=SIZE,
        pixel_size_in_angstroms=PIXEL,
        snr=1.0,
        seed=0,
        shift_standard_deviation_in_angstroms=8.0,
    )
    text = (folder / "Extract" / "particles.star").read_text()
    (folder / "particles.star").write_text(text.replace("@particles.mrcs", "@Extract/particles.mrcs"))
    reconstruct(
        ParticleStack.open(folder / "particles.star"), folder / "run", Settings.assemble("auto", None, SETTINGS)
    )
    return folder


@pytest.fixture(scope="module")
def run(project):
    return RunFolder.open(project / "run")


@pytest.fixture(scope="module")
def images(project):
    return mrcfile.read(project / "Extract" / "particles.mrcs")


@pytest.fixture
def old(run, project, images, tmp_path):
    """The run as if its particles had come from RELION 3.0."""
    return run_from(run, tmp_path / "old_run", star_of_old(project, tmp_path / "old", images), sign=-1)


@pytest.fixture
def foreign(run, project, images, tmp_path):
    """The run as if its particles had come from cryoSPARC."""
    return run_from(run, tmp_path / "foreign_run", dataset(project, tmp_path / "foreign", images), sign=-1)


def run_from(run, folder, particles, sign=1, faults=(), **opened):
    """The same run as if its particles had come in another file."""
    stack = ParticleStack.open(particles, **opened)
    new = RunFolder.create(folder)
    for name in ("map", "mask"):
        shutil.copy(getattr(run, name), new.path)
    for path in (*run.half_maps, run.settings):
        shutil.copy(path, new.path)
    poses, half_set = read_poses(run.particles), column(run.particles, "rlnRandomSubset").astype(int)
    stack.keep_table(new.input_particles).write(new.particles, poses, {"rlnRandomSubset": half_set}, faults)
    summary = json.loads(run.summary.read_text())
    new.write_json(new.summary, summary | {"particles": str(particles), "contrast": {"sign": sign, "z_score": 9.0}})
    return new


def run_at_known_poses(stack, folder, symmetry):
    """A run on particles at the poses of their file, made by the parts that a run is made of, and those particles."""
    source = RunFolder.create(folder / "run")
    poses, half_set = stack.poses, torch.arange(stack.n_particles) % 2
    prepared = prepare_particles(stack, BOX, folder / "scratch", sign=1)
    imaging, sets = prepared.imaging(BOX // 2), HalfSets.empty(BOX)
    noise = prepared.power(torch.arange(stack.n_particles), BOX // 2)
    for half in (0, 1):
        rows = (half_set == half).nonzero().flatten()
        sets.sums[half].add(prepared.batch(rows), poses[rows], imaging, noise.precision(imaging))
    sets = symmetrized_half_sets(sets, PointGroup.named(symmetry))
    maps = HalfMaps.of(sets, prepared.pixel_size_in_angstroms)
    for path, density in zip(
        (source.map, *source.half_maps, source.mask),
        (maps.combined(sets), maps.first, maps.second, maps.mask),
        strict=True,
    ):
        source.write_map(path, density, prepared.pixel_size_in_angstroms)
    stack.keep_table(source.input_particles).write(source.particles, poses, {"rlnRandomSubset": half_set.numpy() + 1})
    source.write_json(source.summary, {"particles": str(stack.table.path), "contrast": {"sign": 1}})
    source.write_text(source.settings, Settings(symmetry=symmetry).to_toml())
    return source, prepared


def column(star, name):
    return np.array(plain_parse(star)["particles"][name], dtype=float)


def star_of_old(project, folder, images):
    """RELION 3.0: no optics, origins in pixels, here of earlier poses; dark protein."""
    folder.mkdir()
    write_images(folder / "dark.mrcs", -images, PIXEL)
    columns = plain_parse(project / "particles.star")["particles"]
    del columns["rlnOpticsGroup"]
    columns["rlnImageName"] = [name.replace("Extract/particles", "dark") for name in columns["rlnImageName"]]
    constants = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}
    constants |= {"rlnMagnification": 10000.0, "rlnDetectorPixelSize": PIXEL, "rlnAngleRot": 11.0, "rlnAngleTilt": 12.0}
    constants |= {"rlnAnglePsi": 13.0, "rlnOriginX": 3.0, "rlnOriginY": 4.0, "rlnMicrographName": "m.mrc"}
    columns |= {name: [value] * N for name, value in constants.items()}
    return write_star(folder / "old.star", columns, None)


def dataset(project, folder, images, mark=b""):
    """A project of cryoSPARC: a dataset of two stacks whose names start from its folder; dark protein."""
    (folder / "J1" / "extract").mkdir(parents=True)
    half = N // 2
    write_images(folder / "J1" / "extract" / "a.mrc", -images[:half], PIXEL)
    write_images(folder / "J1" / "extract" / "b.mrc", -images[half:], PIXEL)
    star = {
        name: column(project / "particles.star", name) for name in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
    }
    random = np.random.default_rng(5)
    columns = {
        "uid": random.integers(2**63, size=N, dtype="u8"),
        "blob/path": np.where(np.arange(N) < half, mark + b"J1/extract/a.mrc", mark + b"J1/extract/b.mrc"),
        "blob/idx": (np.arange(N) % half).astype("u4"),
        "blob/shape": np.full((N, 2), SIZE, dtype="u4"),
        "blob/psize_A": np.full(N, PIXEL, dtype="f4"),
        "blob/sign": np.full(N, -1, dtype="f4"),
        "ctf/accel_kv": np.full(N, 300, dtype="f4"),
        "ctf/cs_mm": np.full(N, 2.7, dtype="f4"),
        "ctf/amp_contrast": np.full(N, 0.1, dtype="f4"),
        "ctf/df1_A": star["rlnDefocusU"].astype("f4"),
        "ctf/df2_A": star["rlnDefocusV"].astype("f4"),
        "ctf/df_angle_rad": np.deg2rad(star["rlnDefocusAngle"]).astype("f4"),
        "ctf/phase_shift_rad": np.zeros(N, dtype="f4"),
        "ctf/bfactor": np.zeros(N, dtype="f4"),
        "location/micrograph_path": np.full(N, mark + b"J1/m.mrc"),
        "location/center_x_frac": random.random(N).astype("f4"),
        "alignments2D/pose": random.random(N).astype("f4"),
    }
    return save_dataset(folder / "particles.cs", columns)


def save_dataset(path, columns):
    records = np.empty(N, dtype=[(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        records[name] = values
    with path.open("wb") as file:
        np.save(file, records)
    return path


# ------------------------------------------------------------------------------ what other programs make of them


def rotation_matrix(vector):
    """As pyem has it (geom.expmap): Rodrigues' formula with the other sign of the sine, RELION's Euler matrix."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    k = np.array([[0, z, -y], [-z, 0, x], [y, -x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def map_of_dataset(path, folder, run):
    """A map (BOX, BOX, BOX) of a dataset by NumPy alone: its poses, images and CTF, on a padded grid."""
    j = np.arange(-BOX // 2 + 1, BOX // 2)
    jx, jy = (axis.ravel() for axis in np.meshgrid(j, j))
    inside = (jx**2 + jy**2 > 0) & (jx**2 + jy**2 < (BOX / 2) ** 2)
    jx, jy = jx[inside], jy[inside]
    stacks, size = {}, 2 * BOX
    sums, weights = np.zeros(size**3, dtype=complex), np.zeros(size**3)
    for row in np.load(path, allow_pickle=False):
        name = row["blob/path"].decode()
        if name not in stacks:
            stacks[name] = mrcfile.read(path.parent / name[1:] if name.startswith(">") else folder / name)
        image = row["blob/sign"] * stacks[name][row["blob/idx"]].astype(float)
        seen = np.fft.fft2(np.fft.ifftshift(image))[jy % SIZE, jx % SIZE]
        pixel = float(row["blob/psize_A"])
        ctf = textbook_ctf(
            torch.from_numpy(np.stack([jx, jy], axis=1) / SIZE),
            pixel_size_in_angstroms=pixel,
            voltage_in_kilovolts=float(row["ctf/accel_kv"]),
            spherical_aberration_in_mm=float(row["ctf/cs_mm"]),
            amplitude_contrast=float(row["ctf/amp_contrast"]),
            defocus_u_in_angstroms=float(row["ctf/df1_A"]),
            defocus_v_in_angstroms=float(row["ctf/df2_A"]),
            defocus_angle_in_degrees=float(np.rad2deg(row["ctf/df_angle_rad"])),
            phase_shift_in_degrees=float(np.rad2deg(row["ctf/phase_shift_rad"])),
            b_factor_in_square_angstroms=float(row["ctf/bfactor"]),
        ).numpy()
        # Both programs move the image by its shift before they take it.
        shift = row["alignments3D/shift"] * float(row["alignments3D/psize_A"]) / pixel
        centred = seen * np.exp(-2j * np.pi * (jx * shift[0] + jy * shift[1]) / SIZE)
        # RELION's matrix takes the particle to the image, and the points of the image are turned back by it.
        points = np.stack([jx, jy, 0 * jx], axis=1) @ rotation_matrix(row["alignments3D/pose"].astype(float)) * 2
        corner = np.floor(points).astype(int)
        for step in np.ndindex(2, 2, 2):
            share = np.abs(1 - np.array(step) - (points - corner)).prod(axis=1)
            x, y, z = ((corner + step) % size).T
            place = (z * size + y) * size + x
            sums += np.bincount(place, share * ctf * centred.real, size**3)
            sums += 1j * np.bincount(place, share * ctf * centred.imag, size**3)
            weights += np.bincount(place, share * ctf**2, size**3)
    frequency = np.fft.fftfreq(size, 1 / size) / 2
    radius = np.sqrt(frequency[:, None, None] ** 2 + frequency[:, None] ** 2 + frequency**2)
    # The run's map ends where its half maps part.
    last = n_shells_above(torch.from_numpy(half_map_fsc(run)), 0.143)
    shell = np.minimum(np.floor(radius + 0.5).astype(int).ravel(), BOX // 2 + 1)
    mean = np.bincount(shell, weights) / np.bincount(shell)
    spectrum = sums / (weights + (mean * np.append(noise_over_signal(run), 1))[shell] + 1e-9)
    spectrum[(radius.ravel() >= last + 0.5) | (radius.ravel() == 0)] = 0
    density = np.fft.fftshift(np.fft.ifftn(spectrum.reshape(size, size, size)).real)
    middle = slice(size // 2 - BOX // 2, size // 2 + BOX // 2)
    falloff = np.sinc((np.arange(BOX) - BOX // 2) / size) ** 2
    return density[middle, middle, middle] / (falloff[:, None, None] * falloff[:, None] * falloff)


def half_map_fsc(run):
    with run.fsc.open() as file:
        return np.array([float(row["fsc"]) for row in csv.DictReader(file)])


def fsc_to_map(run, density):
    """FSC of a map with that of the run, inside its mask, in every shell up to the resolution."""
    ours, mask = (torch.from_numpy(read_map(path).density) for path in (run.map, run.mask))
    n_shells = n_shells_above(torch.from_numpy(half_map_fsc(run)), 0.143)
    # The run's map ends there, and a mask takes what is beyond a little further in.
    j = torch.fft.fftfreq(BOX, 1 / BOX)
    inside = (j[:, None, None] ** 2 + j[:, None] ** 2 + j**2).sqrt() < n_shells + 0.5
    cut = torch.fft.ifftn(torch.fft.fftn(torch.as_tensor(density)) * inside).real.float()
    return fourier_shell_correlation(cut * mask, ours * mask)[1 : n_shells + 1]


def resolution(run):
    return json.loads(run.summary.read_text())["half_map_agreement_in_angstroms"]


def noise_over_signal(run):
    half = np.clip(half_map_fsc(run), 1e-3, 0.999)
    whole = 2 * half / (1 + half)
    return (1 - whole) / whole


@pytest.mark.parametrize("source", ["run", "old", "foreign"])
def test_the_dataset_read_as_cryosparc_and_pyem_do_gives_the_map_of_the_run(source, request, run, tmp_path):
    exported = export_run(request.getfixturevalue(source), "cryosparc", tmp_path / "out.cs")
    theirs = map_of_dataset(exported.path, tmp_path / "foreign", run)
    # 0.9990 in the last shell, 0.9997 at least in the others, whether protein is bright or dark in the images.
    assert fsc_to_map(run, theirs).min() > 0.998


@needs_relion
@pytest.mark.parametrize(("source", "sign"), [("run", 1), ("old", -1), ("foreign", -1)])
def test_relion_makes_the_map_of_the_run_from_its_file(source, sign, request, run, tmp_path):
    source = request.getfixturevalue(source)
    exported = export_run(source, "relion", tmp_path / "out.star")
    arguments = ["--i", str(exported.path), "--o", str(tmp_path / "theirs.mrc"), "--ctf", "--pad", "2"]
    run_relion("relion_reconstruct", exported.image_folder, *arguments)
    theirs = resize_map(torch.from_numpy(read_map(tmp_path / "theirs.mrc").density), BOX)
    fsc = sign * fsc_to_map(run, theirs)
    # 0.994; in the last shell, where the images of the run end and RELION's go on, 0.966.
    assert fsc[:-1].min() > 0.99
    assert fsc[-1] > 0.95
    dark = [line for line in exported.lines() if "protein is dark in these images" in line]
    assert len(dark) == (sign < 0)


@needs_relion
def test_relion_takes_what_is_left_where_images_were_set_aside(run, project, tmp_path):
    faults = [Fault(row, "image", "is constant") for row in (0, 7, N - 1)]
    damaged = run_from(run, tmp_path / "damaged", project / "particles.star", faults=faults)
    exported = export_run(damaged, "relion", tmp_path / "out.star")
    run_relion("relion_reconstruct", project, "--i", str(exported.path), "--o", str(tmp_path / "t.mrc"), "--ctf")
    fsc = fsc_to_map(run, resize_map(torch.from_numpy(read_map(tmp_path / "t.mrc").density), BOX))
    assert fsc[:-1].min() > 0.98


# ------------------------------------------------------------------------------ what stays and what is new


def test_relions_file_has_every_cell_of_the_input_and_the_poses_and_half_sets_of_the_run(run, old, project, tmp_path):
    for source, before in ((run, project / "particles.star"), (old, tmp_path / "old" / "old.star")):
        exported = export_run(source, "relion", tmp_path / f"{source.path.name}.star")
        assert (exported.n_particles, exported.n_left_out, exported.check.n_images) == (N, 0, N)
        assert exported.check.worst_fsc > 0.999
        assert exported.check.period_in_angstroms == pytest.approx(resolution(run))
        assert exported.image_folder == before.parent.resolve()
        cells, given = (plain_parse(path)["particles"] for path in (exported.path, before))
        for name in set(given) - {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY"}:
            assert cells[name] == given[name], name
        assert cells == plain_parse(source.particles)["particles"]
        assert cells["rlnRandomSubset"].count("1") == N // 2
    # RELION 3.0 keeps origins in pixels of the images.
    angstroms, pixels = column(tmp_path / "run.star", "rlnOriginXAngst"), column(exported.path, "rlnOriginX")
    np.testing.assert_allclose(pixels * PIXEL, angstroms, atol=1e-5)
    assert "rlnOriginXAngst" not in cells


@pytest.mark.parametrize("mark", [b"", b">"], ids=["from the project", "from the dataset"])
def test_uids_and_all_other_fields_of_a_dataset_stay(mark, run, project, images, tmp_path):
    given = dataset(project, tmp_path / "foreign", images, mark)
    source = run_from(run, tmp_path / "run", given, sign=-1)
    (tmp_path / "out").mkdir()
    exported = export_run(source, "cryosparc", tmp_path / "out" / "out.cs")
    assert exported.check.worst_fsc > 0.999
    before, after = np.load(given), np.load(exported.path)
    for name in before.dtype.names:
        if mark and name.endswith("path"):
            expected = [b">../foreign/" + path[1:] for path in before[name].tolist()]
            assert after[name].tolist() == expected
        else:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
            assert after.dtype[name] == before.dtype[name]
    np.testing.assert_array_equal(after["alignments3D/split"], column(source.particles, "rlnRandomSubset") - 1)
    np.testing.assert_allclose(after["alignments3D/psize_A"], PIXEL)
    assert "    metafile: '>out.cs'" in (tmp_path / "out" / "out.csg").read_text().splitlines()
    if mark:
        theirs = map_of_dataset(exported.path, tmp_path, run)
        assert fsc_to_map(run, theirs).min() > 0.998


def test_a_new_dataset_leads_to_the_images_and_knows_their_contrast(run, old, project, tmp_path):
    bright = np.load(export_run(run, "cryosparc", project / "bright.cs").path)
    assert set(bright["blob/path"].tolist()) == {b">Extract/particles.mrcs"}
    assert (bright["blob/sign"] == 1).all()
    (tmp_path / "elsewhere").mkdir()
    again = np.load(export_run(run, "cryosparc", tmp_path / "elsewhere" / "again.cs").path)
    assert set(again["blob/path"].tolist()) == {str(project.resolve() / "Extract" / "particles.mrcs").encode()}
    np.testing.assert_array_equal(again["uid"], bright["uid"])
    dark = np.load(export_run(old, "cryosparc", tmp_path / "dark.cs").path)
    assert (dark["blob/sign"] == -1).all()
    # The other run's particles have no figure of merit.
    for stored, merit in ((bright, column(run.particles, "rlnParticleFigureOfMerit")), (dark, 1)):
        assert (stored["blob/shape"] == SIZE).all()
        np.testing.assert_array_equal(stored["blob/idx"], np.arange(N))
        np.testing.assert_array_equal(stored["alignments3D/split"], column(run.particles, "rlnRandomSubset") - 1)
        np.testing.assert_allclose(stored["alignments3D/class_posterior"], merit, atol=1e-6)


def test_relion_is_led_to_the_stacks_of_a_dataset_by_names_that_it_takes(run, project, images, tmp_path):
    given = dataset(project, tmp_path / "a project", images)
    extract = tmp_path / "a project" / "J1" / "extract"
    (extract / "b.mrc").rename(extract / "b.mrcs")
    text = given.read_bytes()
    # A field of as many characters as the longest name has.
    records = np.load(given)
    columns = {name: records[name] for name in records.dtype.names}
    columns["blob/path"] = np.char.replace(columns["blob/path"], b"b.mrc", b"b.mrcs")
    assert save_dataset(given, columns).read_bytes() != text
    source = run_from(run, tmp_path / "run", given, sign=-1)
    inside = export_run(source, "relion", tmp_path / "a project" / "in.star")
    names = plain_parse(inside.path)["particles"]["rlnImageName"]
    assert names[0] == "000001@in_stacks/a.mrcs"
    assert names[-1] == f"{N // 2:06d}@J1/extract/b.mrcs"
    assert files_in(tmp_path / "a project" / "in_stacks") == ["a.mrcs"]
    assert (tmp_path / "a project" / "in_stacks" / "a.mrcs").samefile(extract / "a.mrc")
    (tmp_path / "out").mkdir()
    outside = export_run(source, "relion", tmp_path / "out" / "my particles.star")
    # The whole path would have a blank.
    names = plain_parse(outside.path)["particles"]["rlnImageName"]
    assert names[-1] == f"{N // 2:06d}@my_particles_stacks/b.mrcs"
    assert outside.image_folder == tmp_path / "out"
    assert ParticleStack.open(outside.path).n_particles == N


def test_bare_stacks_become_files_of_both_programs(run, project, tmp_path, images):
    write_images(tmp_path / "bare.mrc", images, PIXEL)
    star = {
        name: column(project / "particles.star", name) for name in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
    }
    constants = [np.full(N, value) for value in (300, 2.7, 0.1, 0)]
    rows = np.stack([np.full(N, SIZE), np.full(N, PIXEL), *star.values(), *constants], axis=1)
    (tmp_path / "ctf.pkl").write_bytes(pickle.dumps(rows))
    source = run_from(run, tmp_path / "run", tmp_path / "bare.mrc", ctf=tmp_path / "ctf.pkl")
    relion = export_run(source, "relion", tmp_path / "out.star")
    assert plain_parse(relion.path)["particles"]["rlnImageName"][1] == "000002@out_stacks/bare.mrcs"
    dataset = export_run(source, "cryosparc", tmp_path / "out.cs")
    assert np.load(dataset.path)["blob/path"][1] == b">bare.mrc"
    assert min(relion.check.worst_fsc, dataset.check.worst_fsc) > 0.999


def test_particles_set_aside_are_left_out_and_counted(run, project, images, tmp_path):
    aside = [0, 7, N - 1]
    kept = np.setdiff1d(np.arange(N), aside)
    faults = [Fault(row, "image", "is constant") for row in aside]
    given = dataset(project, tmp_path / "foreign", images)
    source = run_from(run, tmp_path / "run", given, sign=-1, faults=faults)
    for target, out in (("relion", "out.star"), ("cryosparc", "out.cs")):
        exported = export_run(source, target, tmp_path / out)
        assert (exported.n_particles, exported.n_left_out) == (N - 3, 3)
        assert exported.lines()[0] == f"{tmp_path / out}: {N - 3} particles; 3 without a usable image left out"
        assert exported.check.worst_fsc > 0.99
        assert exported.check.n_images == N - 3
    stored = np.load(tmp_path / "out.cs")
    np.testing.assert_array_equal(stored["uid"], np.load(given)["uid"][kept])
    np.testing.assert_array_equal(stored["alignments3D/split"], column(run.particles, "rlnRandomSubset")[kept] - 1)
    cells = plain_parse(tmp_path / "out.star")["particles"]
    everything = plain_parse(source.particles)["particles"]
    assert cells["rlnAngleRot"] == [everything["rlnAngleRot"][row] for row in kept]
    assert set(cells["cryoaiQuarantined"]) == {"0"}


def test_fields_of_a_passthrough_file_are_written_too(run, project, images, tmp_path):
    records = np.load(dataset(project, tmp_path / "foreign", images))
    blob = [name for name in records.dtype.names if name.startswith("blob")]
    main = save_dataset(
        tmp_path / "foreign" / "main.cs", {name: records[name] for name in records.dtype.names if name not in blob}
    )
    order = np.random.default_rng(0).permutation(N)
    passthrough = save_dataset(
        tmp_path / "foreign" / "passthrough.cs", {name: records[name][order] for name in ("uid", *blob)}
    )
    source = run_from(run, tmp_path / "run", main, sign=-1, passthrough=[passthrough])
    message = refusal(export_run, source, "cryosparc", tmp_path / "out.cs")
    assert "blob/path is missing" in message
    assert "--passthrough" in message
    assert not (tmp_path / "out.cs").exists()
    exported = export_run(source, "cryosparc", tmp_path / "out.cs", passthrough=[passthrough])
    stored = np.load(exported.path)
    for name in records.dtype.names:
        np.testing.assert_array_equal(stored[name], records[name], err_msg=name)
    # What RELION needs is in the run already.
    assert export_run(source, "relion", tmp_path / "out.star").check.worst_fsc > 0.999


@pytest.mark.parametrize(("largest", "is_one"), [(1.0, True), (7.0, False)])
def test_a_confidence_of_the_poses_becomes_cryosparcs_unless_it_is_no_probability(
    run, project, tmp_path, largest, is_one
):
    merit = np.linspace(0.25, largest, N)
    columns = plain_parse(project / "particles.star")
    columns["particles"]["rlnParticleFigureOfMerit"] = [f"{value:.6f}" for value in merit]
    write_star(project / "merit.star", columns["particles"], columns["optics"])
    source = run_from(run, tmp_path / "run", project / "merit.star")
    stored = np.load(export_run(source, "cryosparc", tmp_path / "out.cs").path)
    expected = merit if is_one else np.ones(N)
    np.testing.assert_allclose(stored["alignments3D/class_posterior"], expected, atol=1e-6)


@pytest.fixture
def with_merit(run, project, tmp_path):
    """The run as if it were not sure of all of its poses, and how sure it is."""
    merit = np.random.default_rng(0).random(N).round(6)
    columns = plain_parse(project / "particles.star")
    columns["particles"]["rlnParticleFigureOfMerit"] = [f"{value:.6f}" for value in merit]
    write_star(project / "merit.star", columns["particles"], columns["optics"])
    return run_from(run, tmp_path / "with_merit", project / "merit.star"), merit


def test_only_particles_that_are_sure_enough_are_written(with_merit, output, tmp_path):
    source, merit = with_merit
    kept = np.flatnonzero(merit >= 0.4)
    for target, name in (("relion", "out.star"), ("cryosparc", "out.cs")):
        text = output("export", source.path, tmp_path / name, "--to", target, "--keep-confident", "0.4")
        lines = text.splitlines()
        assert lines[0] == f"{tmp_path / name}: {len(kept)} particles; {N - len(kept)} that are less sure left out"
        assert "read back: FSC 0.999 to that of the same images in the run, and to the run's map at least 0.9" in text
        assert text.endswith(f"(inside its mask, from {len(kept)} images)\n")
    cells, everything = (plain_parse(path)["particles"] for path in (tmp_path / "out.star", source.particles))
    assert cells == {name: [column[row] for row in kept] for name, column in everything.items()}
    stored = np.load(tmp_path / "out.cs")
    np.testing.assert_array_equal(stored["blob/idx"], kept)
    np.testing.assert_allclose(stored["alignments3D/class_posterior"], merit[kept], atol=1e-6)
    np.testing.assert_array_equal(stored["alignments3D/split"], column(source.particles, "rlnRandomSubset")[kept] - 1)


def test_of_a_dataset_the_fields_of_the_surest_stay(run, project, images, tmp_path):
    given = dataset(project, tmp_path / "foreign", images)
    faults = [Fault(7, "image", "is constant")]
    source = run_from(run, tmp_path / "run", given, sign=-1, faults=faults)
    merit = np.linspace(0, 1, N).round(6)
    stack = ParticleStack.open(given).keep_table(source.input_particles)
    half_set = column(run.particles, "rlnRandomSubset").astype(int)
    extra = {"rlnRandomSubset": half_set, "rlnParticleFigureOfMerit": merit}
    stack.write(source.particles, read_poses(run.particles), extra, faults)
    exported = export_run(source, "cryosparc", tmp_path / "out.cs", keep_confident=0.005)
    kept = np.setdiff1d(np.flatnonzero(merit >= 0.005), [7])
    assert (exported.n_particles, exported.n_left_out, exported.n_unsure) == (len(kept), 1, 3)
    np.testing.assert_array_equal(np.load(exported.path)["uid"], np.load(given)["uid"][kept])


def test_a_run_of_which_much_did_not_belong_can_be_exported_without_it(with_merit, tmp_path):
    source, merit = with_merit
    # Its map as particles at wrong poses spoil it: with far too much of the lowest frequencies.
    found = read_map(source.map)
    spoilt = torch.from_numpy(found.density) + 0.6 * float(np.abs(found.density).max()) * soft_sphere(BOX, 3.0, 6.0)
    source.write_map(source.map, spoilt, found.pixel_size_in_angstroms)
    with pytest.raises(RunFailedError, match="gives another map"):
        export_run(source, "relion", tmp_path / "all.star")
    exported = export_run(source, "relion", tmp_path / "some.star", keep_confident=0.5)
    assert exported.n_particles == (merit >= 0.5).sum()
    assert exported.check.worst_fsc < 0.95 < exported.check.worst_fsc_of_same


def test_other_images_than_those_of_the_surest_are_noticed(with_merit, images, tmp_path):
    source, _ = with_merit
    (tmp_path / "other" / "Extract").mkdir(parents=True)
    write_images(tmp_path / "other" / "Extract" / "particles.mrcs", images[::-1], PIXEL)
    with pytest.raises(RunFailedError, match="holds the images of the run"):
        export_run(source, "relion", tmp_path / "out.star", data_dir=tmp_path / "other", keep_confident=0.5)
    assert not (tmp_path / "out.star").exists()


KEPT = {
    "0": (0.0, "--keep-confident 0.0: must be more than 0 and at most 1"),
    "negative": (-0.5, "--keep-confident -0.5: must be"),
    "more than 1": (1.01, "--keep-confident 1.01: must be"),
    "no number": (float("nan"), "--keep-confident nan: must be"),
    "too much": (0.999, "at least 20 are needed: give less"),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_confidence_that_makes_no_sense_is_refused(case, with_merit, tmp_path, complaint):
    least, message = KEPT[case]
    before = files_in(tmp_path)
    out = tmp_path / "out.star"
    assert message in complaint("export", with_merit[0].path, out, "--to", "relion", "--keep-confident", least)
    assert files_in(tmp_path) == before


def test_without_confidences_none_can_be_asked_for(run, with_merit, project, tmp_path):
    source, _ = with_merit
    # Another program's figures of merit came in with the particles, but the run found none.
    summary = json.loads(source.summary.read_text())
    source.write_json(source.summary, summary | {"confidence": None})
    plain = run_from(run, tmp_path / "plain", project / "particles.star")
    for without in (source, plain):
        message = refusal(export_run, without, "relion", tmp_path / "out.star", keep_confident=0.5)
        assert message.startswith(f"--keep-confident 0.5: {without.path} does not say how sure its poses are")
    assert not (tmp_path / "out.star").exists()


# ------------------------------------------------------------------------------ the check


def transposed(poses):
    return PoseColumns(-poses.angles_in_degrees[:, ::-1], poses.origins_in_angstroms)


def of_the_other_hand(poses):
    return PoseColumns(poses.angles_in_degrees + np.array([180, 0, 180]), poses.origins_in_angstroms)


def with_origins(poses, factors):
    return PoseColumns(poses.angles_in_degrees, poses.origins_in_angstroms * factors)


MISTAKES = {
    "signs of the shifts": lambda poses: with_origins(poses, -1),
    "sign of one shift": lambda poses: with_origins(poses, [1, -1]),
    "x for y": lambda poses: PoseColumns(poses.angles_in_degrees, poses.origins_in_angstroms[:, ::-1]),
    "pixels for angstroms": lambda poses: with_origins(poses, 1 / PIXEL),
    "no shifts": lambda poses: with_origins(poses, 0),
    "rotation transposed": transposed,
    "rot for psi": lambda poses: PoseColumns(poses.angles_in_degrees[:, ::-1], poses.origins_in_angstroms),
    "other hand": of_the_other_hand,
    "a row too late": lambda poses: PoseColumns(
        np.roll(poses.angles_in_degrees, 1, axis=0), np.roll(poses.origins_in_angstroms, 1, axis=0)
    ),
}
WRITERS = {"rewrite_star": ("run", "relion"), "write_cryosparc": ("run", "cryosparc")}
WRITERS |= {"rewrite_cryosparc": ("foreign", "cryosparc")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_poses_of_the_surest_is_noticed_too(mistake, with_merit, tmp_path, monkeypatch):
    right = cryoai.export.rewrite_star

    def wrong(*arguments):
        right(*(MISTAKES[mistake](a) if isinstance(a, PoseColumns) else a for a in arguments))

    monkeypatch.setattr(cryoai.export, "rewrite_star", wrong)
    with pytest.raises(RunFailedError, match=r"gives another map than the run's: read back, FSC -?0\.\d\d within"):
        export_run(with_merit[0], "relion", tmp_path / "out.star", keep_confident=0.5)
    assert not (tmp_path / "out.star").exists()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_poses_is_noticed_and_leaves_no_file(writer, mistake, request, tmp_path, monkeypatch):
    source, target = WRITERS[writer]
    source = request.getfixturevalue(source)
    right = getattr(cryoai.export, writer)

    def wrong(*arguments, **options):
        changed = [MISTAKES[mistake](a) if isinstance(a, PoseColumns) else a for a in arguments]
        assert sum(a is not b for a, b in zip(arguments, changed, strict=True)) == 1
        right(*changed, **options)

    monkeypatch.setattr(cryoai.export, writer, wrong)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / f"out{'.star' if target == 'relion' else '.cs'}"
    with pytest.raises(RunFailedError, match=r"gives another map than the run's: read back, FSC -?0\.\d\d within"):
        export_run(source, target, out)
    assert files_in(tmp_path / "out") == []


def test_other_images_than_those_of_the_run_are_noticed(foreign, tmp_path):
    stack = tmp_path / "foreign" / "J1" / "extract" / "a.mrc"
    turned = mrcfile.read(stack)[::-1]
    stack.unlink()
    write_images(stack, turned, PIXEL)
    (tmp_path / "out").mkdir()
    for target, out in (("relion", "out.star"), ("cryosparc", "out.cs")):
        with pytest.raises(RunFailedError, match="holds the images of the run") as caught:
            export_run(foreign, target, tmp_path / "out" / out)
        assert str(stack.parent.resolve()) in str(caught.value)
        assert files_in(tmp_path / "out") == []


def test_where_the_images_are_gone_the_check_is_left_out_and_that_is_said(old, foreign, tmp_path):
    (tmp_path / "moved").mkdir()
    (tmp_path / "old" / "dark.mrcs").rename(tmp_path / "moved" / "dark.mrcs")
    shutil.move(tmp_path / "foreign" / "J1", tmp_path / "moved" / "J1")
    for source, target, out, stack in (
        (old, "relion", "out.star", "dark.mrcs"),
        (foreign, "cryosparc", "out.cs", "J1/extract/a.mrc"),
    ):
        exported = export_run(source, target, tmp_path / out)
        assert exported.check is None
        assert exported.lines()[-1].startswith(f"not read back, because {stack} was not found: give the folder")
        (tmp_path / out).unlink()
        (tmp_path / out).with_suffix(".csg").unlink(missing_ok=True)
        exported = export_run(source, target, tmp_path / out, data_dir=tmp_path / "moved")
        assert exported.check.worst_fsc > 0.999
        assert exported.lines()[-2] == f"image names start from {tmp_path.resolve() / 'moved'}"
    # Names that have to lead to the images cannot be made without them.
    for source, target, out, stack in (
        (old, "cryosparc", "new.cs", "dark.mrcs"),
        (foreign, "relion", "new.star", "J1/extract/a.mrc"),
    ):
        message = refusal(export_run, source, target, tmp_path / out)
        assert f"image stack {stack} not found" in message
        assert message.endswith("--data-dir")
        assert export_run(source, target, tmp_path / out, data_dir=tmp_path / "moved").check.worst_fsc > 0.999


def test_images_are_found_from_wherever_the_export_is_started(run, tmp_path, monkeypatch, project):
    copy = RunFolder(project / "deep" / "run")
    shutil.copytree(run.path, copy.path)
    summary = json.loads(run.summary.read_text())
    copy.write_json(copy.summary, summary | {"particles": "particles.star"})
    monkeypatch.chdir(tmp_path)
    exported = export_run(copy, "relion", tmp_path / "out.star")
    assert exported.check.worst_fsc > 0.999
    assert exported.image_folder == project.resolve()


def test_of_many_images_some_are_taken_and_the_shells_judged_in_which_they_can_show_the_map(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cryoai.read_back, "_ENOUGH_IMAGES", N // 2)
    exported = export_run(run, "relion", tmp_path / "some.star")
    assert exported.check.n_images == N // 2
    assert resolution(run) < exported.check.period_in_angstroms < 3 * resolution(run) + 1
    assert 0.98 < exported.check.worst_fsc < 0.9999
    assert exported.lines()[-1].endswith(
        f"to {exported.check.period_in_angstroms:.1f} Å (inside its mask, from {N // 2} images)"
    )
    # So few would say nothing of a third of the shells.
    monkeypatch.setattr(cryoai.read_back, "_ENOUGH_IMAGES", 10)
    exported = export_run(run, "relion", tmp_path / "all.star")
    assert exported.check.n_images == N
    assert exported.check.period_in_angstroms == pytest.approx(resolution(run))


def test_optics_groups_of_other_pixels_and_strength_give_the_map_of_their_run(tmp_path):
    """Made at known poses by the parts that a run is made of."""
    columns, optics = {}, {}
    for group, (n, size, pixel_size, snr) in enumerate([(250, 48, 4.5, 0.5), (200, 54, 4.0, 0.05)], 1):
        folder = tmp_path / f"group{group}"
        folder.mkdir()
        made = simulate(
            protein_like_phantom(0),
            folder,
            n_particles=n,
            n_pixels=size,
            pixel_size_in_angstroms=pixel_size,
            snr=snr,
            seed=group,
            shift_standard_deviation_in_angstroms=8.0,
        )
        tables = plain_parse(made.truth)
        for table, all_columns in (("particles", columns), ("optics", optics)):
            tables[table]["rlnOpticsGroup"] = [str(group)] * len(tables[table]["rlnOpticsGroup"])
            for name, cells in tables[table].items():
                all_columns.setdefault(name, []).extend(c.replace("@", f"@group{group}/") for c in cells)
    stack = ParticleStack.open(write_star(tmp_path / "p.star", columns, optics))
    source, prepared = run_at_known_poses(stack, tmp_path, "C1")
    assert prepared.optics.contrast_scale.min() < 0.5
    relion = export_run(source, "relion", tmp_path / "out.star")
    dataset = export_run(source, "cryosparc", tmp_path / "out.cs")
    # 0.978 if both groups are taken to be of the same strength.
    assert min(relion.check.worst_fsc, dataset.check.worst_fsc) > 0.999
    stored = np.load(dataset.path)
    np.testing.assert_allclose(stored["alignments3D/psize_A"], [4.5] * 250 + [4.0] * 200)
    np.testing.assert_array_equal(stored["blob/shape"][[0, -1]], [[48, 48], [54, 54]])


def test_a_symmetric_run_is_read_back_with_its_symmetry(tmp_path):
    phantom = protein_like_phantom(0)
    symmetric = symmetrized_map(torch.from_numpy(phantom.density), PointGroup.named("D2")).numpy()
    made = simulate(
        MrcMap(symmetric, phantom.pixel_size_in_angstroms),
        tmp_path,
        n_particles=100,
        n_pixels=SIZE,
        pixel_size_in_angstroms=PIXEL,
        snr=0.1,
        seed=0,
    )
    stack = ParticleStack.open(made.truth)
    source, _ = run_at_known_poses(stack, tmp_path, "D2")
    for target, name in (("relion", "out.star"), ("cryosparc", "out.cs")):
        assert export_run(source, target, tmp_path / name).check.worst_fsc > 0.999
    # The same settings as a run of an earlier version wrote them, or of one without symmetry.
    text = source.settings.read_text()
    source.write_text(source.settings, text.replace('symmetry = "D2"\n', ""))
    with pytest.raises(RunFailedError, match="gives another map"):
        export_run(source, "relion", tmp_path / "without.star")


def test_defocus_that_the_run_refined_is_exported(run, project, images, tmp_path):
    given = dataset(project, tmp_path / "foreign", images)
    source = run_from(run, tmp_path / "run", given, sign=-1)
    changes = np.random.default_rng(0).normal(scale=150.0, size=N)
    changes[::5] = 0
    records = np.load(given)
    stack = ParticleStack.open(given).keep_table(source.input_particles)
    refined = {"rlnDefocusU": records["ctf/df1_A"] + changes, "rlnDefocusV": records["ctf/df2_A"] + changes}
    half_set = {"rlnRandomSubset": column(run.particles, "rlnRandomSubset").astype(int)}
    stack.write(source.particles, read_poses(run.particles), refined | half_set)
    for target, name in (("relion", "out.star"), ("cryosparc", "out.cs")):
        export_run(source, target, tmp_path / name)
    stored = np.load(tmp_path / "out.cs")
    for name, theirs in (("ctf/df1_A", "rlnDefocusU"), ("ctf/df2_A", "rlnDefocusV")):
        np.testing.assert_allclose(stored[name], refined[theirs], rtol=0, atol=2e-3)
        np.testing.assert_allclose(column(tmp_path / "out.star", theirs), refined[theirs], rtol=0, atol=1e-5)
        assert stored.dtype[name] == records.dtype[name]
        # What was not changed is what came in, to the last bit.
        np.testing.assert_array_equal(stored[name][::5], records[name][::5])
    for name in set(records.dtype.names) - {"ctf/df1_A", "ctf/df2_A"}:
        np.testing.assert_array_equal(stored[name], records[name], err_msg=name)


# ------------------------------------------------------------------------------ bad input


def test_what_is_there_already_is_not_written_over(run, tmp_path):
    for name, target, there in (
        ("a.star", "relion", "a.star"),
        ("b.star", "relion", "b_stacks"),
        ("c.cs", "cryosparc", "c.cs"),
        ("d.cs", "cryosparc", "d.csg"),
    ):
        (tmp_path / there).write_text("mine")
        message = refusal(export_run, run, target, tmp_path / name)
        assert message == f"{tmp_path / there}: is there already; give another name or remove it"
        assert (tmp_path / there).read_text() == "mine"
    assert "is there already" in refusal(export_run, run, "relion", run.particles)
    assert len(files_in(tmp_path)) == 4


def test_names_that_cannot_be_written_are_refused(run, tmp_path):
    assert "--to relion writes a .star file" in refusal(export_run, run, "relion", tmp_path / "a.cs")
    assert "--to cryosparc writes a .cs file" in refusal(export_run, run, "cryosparc", tmp_path / "a.csg")
    assert f"there is no folder {tmp_path / 'no'}" in refusal(export_run, run, "relion", tmp_path / "no" / "a.star")
    assert "--data-dir" in refusal(export_run, run, "relion", tmp_path / "a.star", data_dir=tmp_path / "none")
    message = refusal(export_run, run, "cryosparc", tmp_path / "a.cs", passthrough=[tmp_path / "p.cs"])
    assert message.startswith(f"--passthrough {tmp_path / 'p.cs'}: ")
    assert files_in(tmp_path) == []


DAMAGE = {
    "no particles": (lambda run: run.particles.unlink(), "particles.star: no such file"),
    "no map": (lambda run: run.map.unlink(), "map.mrc: no such file"),
    "no copy": (lambda run: (run.path / "input_particles.star").unlink(), "input_particles.star is missing"),
    "no contrast": (lambda run: run.summary.write_text('{"particles": "p.star"}'), "not as a run writes it"),
    "no summary": (lambda run: run.summary.write_text("{"), "not as a run writes it"),
    "no settings": (lambda run: run.settings.unlink(), "settings.toml: no such file"),
    "no readable settings": (lambda run: run.settings.write_text("="), "settings.toml: not as a run writes it"),
    "no half sets": (
        lambda run: run.particles.write_text(run.particles.read_text().replace("rlnRandomSubset", "rlnOther")),
        "no half set (rlnRandomSubset)",
    ),
    "no poses": (
        lambda run: run.particles.write_text(run.particles.read_text().replace("rlnAngleTilt", "rlnOther")),
        "no poses; restore",
    ),
    "another mask": (lambda run: run.write_map(run.mask, torch.ones(8, 8, 8), 3.0), "maps are of different sizes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_is_not_whole_is_refused(damage, run, tmp_path):
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    change, words = DAMAGE[damage]
    change(copy)
    assert words in refusal(export_run, copy, "relion", tmp_path / "out.star")
    assert files_in(tmp_path) == ["run"]


def test_a_copy_of_another_dataset_is_refused(foreign, tmp_path):
    copy = foreign.path / "input_particles.cs"
    records = np.load(copy)[:-1]
    with copy.open("wb") as file:
        np.save(file, records)
    message = refusal(export_run, foreign, "cryosparc", tmp_path / "out.cs")
    assert f"{N - 1} rows, but the run has {N}" in message
    assert not (tmp_path / "out.cs").exists()
