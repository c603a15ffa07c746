import gzip
import tracemalloc
import warnings

import mrcfile
import numpy as np
import pytest

from cryoai.formats.mrc import MrcMap, StackWriter, open_stack, read_map, write_map
from stacks import files_in, refusal, write_images, zoo

RANDOM = np.random.default_rng(0)
DENSITY = RANDOM.normal(size=(12, 12, 12)).astype(np.float32)
IMAGES = RANDOM.normal(size=(5, 12, 12)).astype(np.float32)
MACHINE_STAMP, MAP_WORD, COLUMN_AXIS = 212, 208, 64  # offsets in the header


def overwrite(path, offset, content):
    data = bytearray(path.read_bytes())
    start = offset % len(data)
    data[start : start + len(content)] = content
    path.write_bytes(data)


def write_raw_map(path, density, voxel_size=1.5):
    with mrcfile.new(path) as file:
        file.set_data(density)
        file.set_volume()
        file.voxel_size = voxel_size
    return path


def test_a_map_comes_back_as_it_was_written(tmp_path):
    write_map(tmp_path / "a.mrc", DENSITY, 1.75)
    found = read_map(tmp_path / "a.mrc")
    assert isinstance(found, MrcMap)
    np.testing.assert_array_equal(found.density, DENSITY)
    assert found.pixel_size_in_angstroms == pytest.approx(1.75, rel=1e-6)


def test_a_written_map_satisfies_the_standard(tmp_path):
    write_map(tmp_path / "a.mrc", DENSITY, 1.75)
    assert mrcfile.validate(tmp_path / "a.mrc")


def test_a_stack_written_in_pieces_comes_back_whole_and_is_mapped_not_read(tmp_path):
    with StackWriter(tmp_path / "a.mrcs", 5, 12, 2.5) as writer:
        writer.write(2, IMAGES[2:])
        writer.write(0, IMAGES[:2])
    stack = open_stack(tmp_path / "a.mrcs")
    assert (stack.n_images, stack.n_rows, stack.n_columns) == (5, 12, 12)
    images = stack.map_images()
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(images, IMAGES)
    with mrcfile.open(tmp_path / "a.mrcs") as file:
        assert file.is_image_stack()
        assert float(file.voxel_size.x) == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "f2", "<f4", ">f4"])
def test_images_of_any_real_mode_and_byte_order_are_read(tmp_path, dtype):
    images = (20 * IMAGES).astype("i1").astype(dtype) if dtype != "u2" else (20 * np.abs(IMAGES)).astype("u2")
    with mrcfile.new(tmp_path / "a.mrcs") as file:
        file.set_data(images)
    np.testing.assert_array_equal(open_stack(tmp_path / "a.mrcs").map_images(), images)


def test_an_extended_header_is_skipped(tmp_path):
    with mrcfile.new(tmp_path / "a.mrcs") as file:
        file.set_data(IMAGES)
        file.set_extended_header(np.full(300, 77, dtype=np.uint8))
    np.testing.assert_array_equal(open_stack(tmp_path / "a.mrcs").map_images(), IMAGES)


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (MACHINE_STAMP, b"\x44\x00\x00\x00"),
        (MACHINE_STAMP, b"\x44\x11\x00\x00"),
        (MACHINE_STAMP, b"\x44\x20\x20\x20"),
        (MACHINE_STAMP, b"\x00\x00\x00\x00"),
        (MAP_WORD, b"MAP\x00"),
        (MAP_WORD, b"\x00\x00\x00\x00"),
    ],
)
def test_harmless_oddities_of_other_writers_are_read(tmp_path, offset, content):
    path = write_images(tmp_path / "a.mrcs", IMAGES)
    overwrite(path, offset, content)
    np.testing.assert_array_equal(open_stack(path).map_images(), IMAGES)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    class PowerCutError(Exception):
        pass

    def write_half_a_stack():
        with StackWriter(tmp_path / "a.mrc", 5, 12, 2.5) as writer:
            writer.write(0, IMAGES[:2])
            raise PowerCutError

    write_map(tmp_path / "a.mrc", DENSITY, 1.75)
    before = (tmp_path / "a.mrc").read_bytes()
    with pytest.raises(ValueError, match="dimension"):
        write_map(tmp_path / "a.mrc", np.zeros((2, 2, 2, 2, 2), dtype=np.float32), 1.75)
    with pytest.raises(PowerCutError):
        write_half_a_stack()
    assert files_in(tmp_path) == ["a.mrc"]
    assert (tmp_path / "a.mrc").read_bytes() == before


def test_of_a_stack_cut_short_the_whole_images_are_left(tmp_path):
    path = write_images(tmp_path / "a.mrcs", IMAGES)
    path.write_bytes(path.read_bytes()[:-4])
    stack = open_stack(path)
    assert (stack.n_images, stack.n_whole) == (len(IMAGES), len(IMAGES) - 1)
    np.testing.assert_array_equal(stack.map_images(), IMAGES[:-1])


def test_a_file_without_one_whole_image_is_refused_with_both_lengths(tmp_path):
    path = write_images(tmp_path / "a.mrcs", IMAGES)
    path.write_bytes(path.read_bytes()[: 1024 + 4 * IMAGES[0].size - 1])
    message = refusal(open_stack, path)
    assert f"({1024 + 4 * IMAGES.size} bytes), the file has {1023 + 4 * IMAGES[0].size} bytes; it was cut" in message


def test_a_map_cut_short_is_refused(tmp_path):
    write_map(tmp_path / "a.mrc", np.zeros((8, 8, 8), dtype=np.float32), 2.0)
    (tmp_path / "a.mrc").write_bytes((tmp_path / "a.mrc").read_bytes()[:-4])
    assert "it was cut short" in refusal(read_map, tmp_path / "a.mrc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable MRC file (it is empty)"),
        (b"eight by", "not a readable MRC file (8 bytes, of which a header alone has 1024)"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 3, "a Git LFS pointer, not the file itself"),
        (b"/annex/objects/MD5-s17--0\n", "a git-annex pointer, not the file itself"),
    ],
)
@pytest.mark.parametrize("read", [open_stack, read_map])
def test_a_file_of_another_kind_is_refused(tmp_path, content, message, read):
    (tmp_path / "a.mrcs").write_bytes(content)
    assert refusal(read, tmp_path / "a.mrcs").startswith(f"{tmp_path / 'a.mrcs'}: {message}")


def test_complex_values_are_refused(tmp_path):
    with mrcfile.new(tmp_path / "a.mrcs") as file:
        file.set_data(IMAGES.astype(np.complex64))
    assert "holds complex values (MRC mode 4)" in refusal(open_stack, tmp_path / "a.mrcs")


@pytest.mark.parametrize(
    ("density", "voxel_size", "message"),
    [
        (DENSITY[:10], 1.5, "the map has 12 x 12 x 10 voxels; a cube is needed"),
        (DENSITY, (1.5, 1.5, 1.6), "one positive size is needed"),
        (DENSITY, 0.0, "one positive size is needed"),
    ],
    ids=["not a cube", "anisotropic voxels", "no voxel size"],
)
def test_a_map_without_one_meaning_is_refused(tmp_path, density, voxel_size, message):
    path = write_raw_map(tmp_path / "a.mrc", density, voxel_size)
    assert message in refusal(read_map, path)


def test_a_map_with_a_value_that_is_no_number_is_refused(tmp_path):
    path = write_raw_map(tmp_path / "a.mrc", DENSITY)
    overwrite(path, -4, np.array(np.nan, dtype="<f4").tobytes())
    assert "the map holds values that are not finite" in refusal(read_map, path)


def test_a_map_with_permuted_axes_is_refused(tmp_path):
    path = write_raw_map(tmp_path / "a.mrc", DENSITY)
    overwrite(path, COLUMN_AXIS, np.array([3, 2, 1], dtype="<i4").tobytes())
    assert "its axes are stored in another order" in refusal(read_map, path)


def test_a_missing_map_is_named(tmp_path):
    assert refusal(read_map, tmp_path / "a.mrc") == f"{tmp_path / 'a.mrc'}: no such file; give a map in MRC format"


# Pointers in place of files, a picture, headers without the data they announce, and compressed files.
NO_STACKS = {
    "LFSPOINTER_cryojax_ribosome_4ug0_micrograph.mrcs",
    "LFSPOINTER_iccp_particles_1000_128.mrcs",
    "gitannex_pointer_aspire_rln_proj_65.mrcs",
    "imp_mini_8bytes.map",
    "leopardem_zero_bytes.mrc",
    "mrcfile_EMD-3001.map.bz2",
    "mrcfile_emd_3197.map.gz",
    "mrcfile_emd_3197.png.gz",
    "pytom_header_only.mrc",
    "sfftk_test_data_corrupt_header.map",
}
CUT_SHORT = {"truncated_drgnai_00256_Ribosomes_1.70A.mrcs"}
CUBES = {"mrcfile_EMD-3197.map", "mrcfile_emd_3197.map.gz", "sfftk_tiny1.map", "sfftk_tiny2.map", "sfftk_tiny3.map"}


@pytest.mark.parametrize("path", zoo("mrc"))
def test_a_file_of_the_zoo_is_read_as_by_mrcfile_or_refused_in_one_line(path):
    if path.name in NO_STACKS:
        assert refusal(open_stack, path).startswith(f"{path}: ")
        return
    stack = open_stack(path)
    images = stack.map_images()
    if path.name in CUT_SHORT:
        content = np.frombuffer(path.read_bytes()[stack.data_offset_in_bytes :], dtype=stack.dtype)
        np.testing.assert_array_equal(images.ravel(), content[: images.size])
        assert stack.n_whole < stack.n_images
        return
    with warnings.catch_warnings(action="ignore"), mrcfile.open(path, permissive=True) as file:
        np.testing.assert_array_equal(np.squeeze(images), np.squeeze(file.data))


@pytest.mark.parametrize("path", zoo("mrc"))
def test_a_file_of_the_zoo_makes_a_map_or_is_refused_in_one_line(path):
    if path.name in CUBES:
        assert read_map(path).pixel_size_in_angstroms > 0
    else:
        assert refusal(read_map, path).startswith(f"{path}: ")


def test_a_long_text_file_is_refused_without_reading_its_announced_header(tmp_path):
    # Text in the place of its length announces an extended header of two gigabytes.
    (tmp_path / "a.mrcs").write_bytes(b"this text is none of the formats that are known\n" * 30)
    tracemalloc.start()
    message = refusal(open_stack, tmp_path / "a.mrcs")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message.startswith(f"{tmp_path / 'a.mrcs'}: not a readable MRC file")
    assert peak < 1e7


def test_a_compressed_file_is_called_so(tmp_path):
    (tmp_path / "a.mrc.gz").write_bytes(gzip.compress(write_images(tmp_path / "a.mrcs", IMAGES).read_bytes()))
    assert "it is compressed: decompress it" in refusal(open_stack, tmp_path / "a.mrc.gz")
