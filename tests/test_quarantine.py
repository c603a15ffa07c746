"""Images that cannot be used are named and set aside, and change nothing for the others."""

import mrcfile
import numpy as np
import pytest
import torch

from cryoai.particle_stack import ParticleStack
from cryoai.particles import Quarantine, prepare_particles, stream_particles
from cryoai.poses import Poses, rotation_grid
from stacks import particle_columns, plain_parse, refusal, write_images, write_star

N, BOX = 12, 32
IMAGES = np.random.default_rng(3).normal(size=(N, BOX, BOX)).astype(np.float32)
FAULTS = {
    2: "has values that are not finite",
    4: "has values beyond all measure",
    5: "has values that are not finite",
    7: "is constant",
    8: "has no noise in its background: masked images cannot be normalised",
    11: "is missing: the stack was cut short",
}
GOOD = [row for row in range(N) if row not in FAULTS]


@pytest.fixture
def damaged(tmp_path):
    images = IMAGES.copy()
    images[7] = 3.5
    offset = np.arange(BOX) - BOX // 2
    images[8][offset[:, None] ** 2 + offset**2 > 100] = 0
    path = write_images(tmp_path / "images.mrcs", images)
    with mrcfile.mmap(path, mode="r+") as file:
        file.data[2, 4, 5] = np.nan
        file.data[5, 0, 0] = np.inf
        file.data[4, 16, 16] = 1e25
    path.write_bytes(path.read_bytes()[:-100])
    return ParticleStack.open(write_star(tmp_path / "p.star", particle_columns(N)))


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    folder.mkdir()
    write_images(folder / "images.mrcs", IMAGES)
    return ParticleStack.open(write_star(folder / "p.star", particle_columns(N)))


def prepared(stack, folder, share=0.5):
    return prepare_particles(stack, BOX, folder / f"{id(stack)}.f16", sign=1, max_faulty_share=share)


def test_every_image_without_use_is_named_with_its_row_and_reason(damaged, tmp_path):
    faults = prepared(damaged, tmp_path).faults
    assert {fault.row: fault.reason for fault in faults} == FAULTS
    assert [fault.image for fault in faults] == [f"{row + 1}@{tmp_path}/images.mrcs" for row in sorted(FAULTS)]


def test_the_others_are_what_they_are_without_it(damaged, whole, tmp_path):
    some, everything = prepared(damaged, tmp_path), prepared(whole, tmp_path)
    assert some.stack_rows.tolist() == GOOD
    assert some.n_particles == len(GOOD)
    rows = torch.arange(some.n_particles)
    expected = everything.batch(torch.tensor(GOOD))
    torch.testing.assert_close(some.batch(rows).coefficients, expected.coefficients, rtol=0, atol=0)
    torch.testing.assert_close(some.batch(rows).optics.defocus_u_in_angstroms, expected.optics.defocus_u_in_angstroms)
    assert everything.faults == ()
    assert everything.stack_rows.tolist() == list(range(N))


def test_a_stream_leaves_them_out_and_keeps_the_numbers_of_the_others(damaged, whole):
    quarantine = Quarantine(damaged, 0.5)
    options = {"extent_in_angstroms": 3.0 * BOX, "sign": 1, "batch_size": 5}
    batches = list(stream_particles(damaged, BOX, quarantine=quarantine, **options))
    assert torch.cat([batch.indices for batch in batches]).tolist() == GOOD
    found = torch.cat([batch.coefficients for batch in batches])
    expected = torch.cat(
        [b.coefficients for b in stream_particles(whole, BOX, quarantine=Quarantine(whole, 0), **options)]
    )
    torch.testing.assert_close(found, expected[GOOD], rtol=0, atol=0)
    assert {fault.row: fault.reason for fault in quarantine.found} == FAULTS


def test_more_than_the_share_is_refused_with_rows_and_rule(damaged, tmp_path):
    message = refusal(prepared, damaged, tmp_path, share=0.25)
    assert message.startswith(f"{tmp_path}/p.star: too many images cannot be used: row 3 (3@{tmp_path}/images.mrcs) ")
    assert "row 6 " in message
    assert "25.0% of 12 are tolerated" in message
    assert len(prepared(damaged, tmp_path, share=6 / 12).faults) == 6


def test_every_row_is_written_and_those_set_aside_are_flagged(damaged, tmp_path):
    faults = prepared(damaged, tmp_path).faults
    damaged.write(tmp_path / "out.star", Poses(rotation_grid(N), torch.zeros(N, 2)), {}, faults)
    written = plain_parse(tmp_path / "out.star")["particles"]
    assert written["rlnImageName"] == particle_columns(N)["rlnImageName"]
    assert [int(cell) for cell in written["cryoaiQuarantined"]] == [int(row in FAULTS) for row in range(N)]


def test_without_faults_there_is_no_flag(whole, tmp_path):
    whole.write(tmp_path / "out.star", Poses(rotation_grid(N), torch.zeros(N, 2)), {})
    assert "cryoaiQuarantined" not in plain_parse(tmp_path / "out.star")["particles"]
