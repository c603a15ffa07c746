"""Well-formed and odd files of every kind, made anew each time: what the mutations start from."""

import bz2
import gzip
import io
import pickle

import numpy as np

from stacks import OPTICS, loop_text, particle_columns

N_IMAGES, N_PIXELS = 8, 32
CTF = np.column_stack(
    [
        np.full(N_IMAGES, N_PIXELS),
        np.full(N_IMAGES, 1.5),
        np.linspace(1e4, 2e4, N_IMAGES),
        np.linspace(9e3, 1.9e4, N_IMAGES),
        np.linspace(-90, 80, N_IMAGES),
        np.full(N_IMAGES, 300),
        np.full(N_IMAGES, 2.7),
        np.full(N_IMAGES, 0.1),
        np.linspace(0, 90, N_IMAGES),
    ]
)
MAP_SIDE = 8
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


# ------------------------------------------------------------------------------ STAR


def _poses(n):
    return {name: [round(7.5 * i - k, 3) for i in range(n)] for k, name in enumerate(("rlnAngleRot", "rlnAngleTilt",
            "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"))}  # fmt: skip


def _version_30(n):
    rest = {"rlnVoltage": [300] * n, "rlnSphericalAberration": [2.7] * n, "rlnAmplitudeContrast": [0.1] * n}
    detector = {"rlnDetectorPixelSize": [15.0] * n, "rlnMagnification": [50000] * n, "rlnOriginX": [1.5] * n}
    columns = {name: cells for name, cells in particle_columns(n).items() if name != "rlnOpticsGroup"}
    return columns | rest | detector | {name: [10.0] * n for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")}


def star_texts():
    """STAR files of RELION 3.1, 3.0, of single items, and odd ones."""
    two_groups = {name: [cells[0], cells[0]] for name, cells in OPTICS.items()} | {"rlnOpticsGroup": [7, 2]}
    version_31 = loop_text("optics", OPTICS) + loop_text("particles", particle_columns(5) | _poses(5))
    items = "".join(f"_{name} {cells[0]}\n" for name, cells in _version_30(1).items())
    aberrations = {"rlnOddZernike": ["[0,0,1.5]"] * 3, "rlnBeamTiltX": [0.5] * 3, "rlnMagMat00": [1] * 3}
    mixed = particle_columns(4) | {"rlnOpticsGroup": [2, 7, 2, 7], "rlnPhaseShift": [0, 90, 45, 1]}
    quoted = _version_30(3) | {"rlnImageName": [f"'{i}@my stack.mrcs'" for i in (1, 2, 3)], "n": ['"a  b"'] * 3}
    both = (
        particle_columns(2)
        | _poses(2)
        | {"rlnOriginX": [0, 1], "rlnImagePixelSize": [1.5, 2], "rlnVoltage": [300, 200]}
    )
    alone = _version_30(2) | {
        "rlnOriginXAngst": [1, 2],
        "rlnImagePixelSize": [3, 3],
        "rlnImageName": ["images.mrcs"] * 2,
    }
    return [
        version_31,
        "# version 30001\n\n" + version_31.replace("\n", " \r\n"),
        "\ufeff" + loop_text("", _version_30(6)),
        loop_text("images", _version_30(2)) + loop_text("micrographs", {"rlnMicrographName": ["a.mrc", "b.mrc"]}),
        f"data_particles\n\n{items}",
        loop_text("optics", two_groups) + loop_text("particles", mixed),
        "# Written by cisTEM\n" + loop_text("", quoted),
        loop_text("optics", OPTICS) + loop_text("particles", particle_columns(3) | aberrations),
        loop_text("optics", OPTICS) + loop_text("particles", both) + loop_text("general", {"rlnTomo": [1]}),
        loop_text("particles", alone),
        loop_text("particles", _poses(3) | {"rlnImageName": ["1@a.mrcs"] * 3}),
    ]  # fmt: skip


def list_texts():
    return ["images.mrcs\n", "images.mrcs\n\n my stack.mrcs \r\n", "./images.mrcs\nimages.mrcs"]


# ------------------------------------------------------------------------------ MRC


def mrc_bytes(data, order="<", mode=2, space_group=0, extended=b"", pixel_size=1.5):
    """An MRC file (nz, ny, nx), written field by field."""
    nz, ny, nx = data.shape
    header = bytearray(1024)
    whole = {0: nx, 4: ny, 8: nz, 12: mode, 28: nx, 32: ny, 36: nz, 64: 1, 68: 2, 72: 3, 88: space_group,
             92: len(extended), 108: 20140}  # fmt: skip
    for offset, value in whole.items():
        header[offset : offset + 4] = np.array(value, dtype=f"{order}i4").tobytes()
    header[40:52] = np.array([nx, ny, nz], dtype=f"{order}f4").__mul__(pixel_size).astype(f"{order}f4").tobytes()
    header[52:64] = np.full(3, 90, dtype=f"{order}f4").tobytes()
    header[208:216] = b"MAP " + (b"\x44\x44\0\0" if order == "<" else b"\x11\x11\0\0")
    return bytes(header) + extended + data.astype(f"{order}{_MODES[mode]}").tobytes()


def mrc_files():
    """Stacks, single images and maps of all modes and both byte orders, some compressed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, size=(2, 8, 8))
    cube = rng.integers(0, 100, size=(MAP_SIDE,) * 3)
    plain = [mrc_bytes(images, order, mode) for order in "<>" for mode in _MODES]
    plain += [mrc_bytes(cube, order, mode, space_group=1) for order in "<>" for mode in (0, 2, 12)]
    plain.append(mrc_bytes(images[:1], extended=bytes(160)))
    plain.append(mrc_bytes(cube, space_group=1, extended=b"x" * 80))
    return [*plain, gzip.compress(plain[2], mtime=0), gzip.compress(plain[-1], mtime=0), bz2.compress(plain[-1])]


def stack_of_companions():
    images = np.random.default_rng(1).normal(size=(N_IMAGES, N_PIXELS, N_PIXELS))
    return mrc_bytes(images)


# ------------------------------------------------------------------------------ cryoSPARC


def dataset_columns(n=5):
    rng = np.random.default_rng(2)
    return {
        "uid": np.arange(1, n + 1).astype("<u8"),
        "blob/path": np.array([b">images.mrcs"] * (n - 1) + [b"my stack.mrcs"]),
        "blob/idx": np.arange(n).astype("<u4"),
        "blob/shape": np.full((n, 2), N_PIXELS, dtype="<u4"),
        "blob/psize_A": np.full(n, 1.5, dtype="<f4"),
        "ctf/accel_kv": np.full(n, 300, dtype="<f4"),
        "ctf/cs_mm": np.full(n, 2.7, dtype="<f4"),
        "ctf/amp_contrast": np.full(n, 0.1, dtype="<f4"),
        "ctf/df1_A": rng.uniform(1e4, 2e4, n).astype("<f4"),
        "ctf/df2_A": rng.uniform(1e4, 2e4, n).astype("<f4"),
        "ctf/df_angle_rad": rng.uniform(-1, 1, n).astype("<f4"),
        "ctf/phase_shift_rad": np.zeros(n, dtype="<f4"),
        "ctf/bfactor": np.zeros(n, dtype="<f4"),
        "ctf/anisomag": np.zeros((n, 4), dtype="<f4"),
        "alignments3D/pose": rng.normal(size=(n, 3)).astype("<f4"),
        "alignments3D/shift": rng.normal(size=(n, 2)).astype("<f4"),
        "alignments3D/psize_A": np.full(n, 1.5, dtype="<f4"),
    }


def dataset_bytes(columns):
    records = np.empty(len(next(iter(columns.values()))), dtype=[(k, v.dtype, v.shape[1:]) for k, v in columns.items()])
    for name, values in columns.items():
        records[name] = values
    file = io.BytesIO()
    np.save(file, records, allow_pickle=True)
    return file.getvalue()


GROUP = b"""created: 2020-01-01 00:00:00
group:
  description: particles
  type: particle
results:
  blob:
    metafile: '>particles.cs'
    num_items: 5
    type: particle.blob
  ctf:
    metafile: '>passthrough_particles.cs'
    type: particle.ctf
version: v4.0.0
"""


def dataset_files():
    """Datasets with and without poses, of other byte order and kind of text, and what is taken for one."""
    columns = dataset_columns()
    bare = {name: values for name, values in columns.items() if not name.startswith("alignments3D")}
    swapped = {name: values.astype(values.dtype.newbyteorder()) for name, values in columns.items()}
    text = columns | {"blob/path": columns["blob/path"].astype("U")}
    files = [dataset_bytes(c) for c in (columns, bare, swapped, text)]
    return [*files, GROUP, b"\x94CSDAT" + files[0][:200], b"PAR1" + files[0][:200]]


# ------------------------------------------------------------------------------ pickles


def pickled_values():
    """What cryoDRGN's pickles hold, and what they might."""
    rotations = np.stack([np.eye(3)] * N_IMAGES)
    shifts = np.linspace(-0.2, 0.2, 2 * N_IMAGES).reshape(N_IMAGES, 2)
    return [
        CTF,
        CTF.astype("f4"),
        np.asfortranarray(CTF.astype(">f8")),
        (rotations, shifts),
        rotations.astype("f4"),
        (rotations,),
        [rotations, shifts, CTF],
        np.arange(N_IMAGES),
        {"a": CTF, "b": [None, "text", 2**80]},
    ]


def pickles():
    return [pickle.dumps(value, protocol) for value in pickled_values() for protocol in range(6)]
