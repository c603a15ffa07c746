"""Damage to files: to text by lines, columns and words; to binary files by fields; to both by bytes.

Every function takes the random numbers to use, so that an input follows from its number alone.
"""

import bz2
import gzip
import re
import struct

import numpy as np

_NAMES = [
    "rlnImageName", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnDefocusU", "rlnDefocusV",
    "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor", "rlnOpticsGroup", "rlnOpticsGroup1", "rlnAngleRot",
    "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY", "rlnOriginXAngst", "rlnOriginYAngst", "rlnPixelSize",
    "rlnImagePixelSize", "rlnDetectorPixelSize", "rlnMagnification", "rlnBeamTiltX", "rlnOddZernike", "rlnMagMat01",
]  # fmt: skip
NUMBERS = [
    "0", "-0", "-1", "1", "nan", "-nan", "inf", "-Infinity", "1e400", "1e308", "-1e308", "1e39", "1e16", "1e-40",
    "5e-324", "1e-400", "0x10", "1_0", "1d5", "+", "--1", "1.2.3", "2147483647", "2147483648", "4294967296",
    "18446744073709551616", "9" * 5000, "\u0661\u0662", "1,5", "None", "?", "*",
]  # fmt: skip
_WORDS = [
    "", "''", '""', "'", '"', "'a b'", "\"a 'b\"", "'a", "#", "#1", "a#b", "_", "_rlnX", "loop_", "data_", "data_x",
    "data_optics", "data_1/x.mrc", ";", "0@images.mrcs", "000@images.mrcs", "1@", "@", "@@", "1@1@images.mrcs",
    "9@images.mrcs", "-1@images.mrcs", "1.0@images.mrcs", "1@nothing.mrcs", "1@/", "1@..", "1@.", "images.mrcs",
    "1@" + "n" * 300, "1@" + "d/" * 3000, "9" * 5000 + "@images.mrcs", "99999999999@images.mrcs", "x" * 20_000,
    "a\0b", "1@a\0b", "\x1b[2J", "a\x0bb", "a\x0cb", "a\x1cb", "a\x85b", "a\u2028b", "\u00a0", "\u200b", "\u202e",
    "\ufeff", "é", "\U0001f600", "~", "%s", "{}", "{0}", "\\n", "//", "con", "[1,2", "[nan]", "]",
]  # fmt: skip
_LINES = [
    "", "loop_", "data_", "data_optics", "data_particles", "data_x y", "loop_ x", "# comment", ";", "; text", "17",
    "_rlnAngleRot", "_rlnImageName #1", "_rlnImageName 1@images.mrcs", "_", "_ 1", "save_x", "stop_", "global_",
    "'a b' 'c", "''", "data_ # x", " data_x", "loop_#", "_rlnX _rlnY", "images.mrcs", "metafile: x", "type: particle",
]  # fmt: skip


# ------------------------------------------------------------------------------ text


def mutated_text(random, text, others):
    """Some mutations of a text, as bytes."""
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        text = random.choice(_TEXT)(random, text, others)
    content = _encoded(random, text)
    return mutated_bytes(random, content, [content]) if random.random() < 0.15 else content


def _encoded(random, text):
    if random.random() < 0.93:
        return text.encode("utf-8", errors="surrogatepass")
    encoding = random.choice(("utf-16", "utf-16-le", "latin1", "cp1252", "utf-32", "utf-8-sig", "cp037"))
    return text.encode(encoding, errors="ignore" if encoding in ("latin1", "cp1252", "cp037") else "surrogatepass")


def _on_lines(change):
    def mutation(random, text, others):
        lines = text.split("\n")
        change(random, lines, others)
        return "\n".join(lines)

    return mutation


def _cut_line(random, lines, _others):
    del lines[random.randrange(len(lines))]
    if not lines:
        lines.append("")


def _repeat_line(random, lines, _others):
    place = random.randrange(len(lines))
    lines[place:place] = [lines[place]] * random.choice((1, 1, 1, 2, 50, 3000))


def _swap_lines(random, lines, _others):
    a, b = random.randrange(len(lines)), random.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]


def _insert_line(random, lines, others):
    line = random.choice((random.choice(_LINES), random.choice(random.choice(others).split("\n")), f"_{_name(random)}"))
    lines.insert(random.randrange(len(lines) + 1), line)


def _join_lines(random, lines, _others):
    place = random.randrange(len(lines))
    lines[place : place + 2] = [random.choice((" ", "", "\t", "\r")).join(lines[place : place + 2])]


def _split_line(random, lines, _others):
    place = random.randrange(len(lines))
    at = random.randrange(len(lines[place]) + 1)
    lines[place : place + 1] = [lines[place][:at], lines[place][at:]]


def _name(random):
    return random.choice(_NAMES)


def _word(random):
    kind = random.random()
    if kind < 0.35:
        return f"{random.uniform(-400, 400):.{random.randrange(8)}f}"
    return random.choice(NUMBERS) if kind < 0.7 else random.choice(_WORDS)


def _change_words(random, lines, _others):
    place = random.randrange(len(lines))
    words = lines[place].split(" ")
    at = random.randrange(len(words))
    kind = random.randrange(5)
    if kind == 0:
        words[at] = _word(random)
    elif kind == 1:
        words.insert(at, _word(random))
    elif kind == 2:
        del words[at]
    elif kind == 3:
        words.insert(at, words[at])
    else:
        words[at] = words[at] + _word(random)
    lines[place] = " ".join(words)


def _change_cell(random, lines, _others):
    """Another value in a row of a table, which reaches further than any in a header."""
    rows = [i for i, line in enumerate(lines) if len(line.split()) > 2]
    if rows:
        place = random.choice(rows)
        words = lines[place].split()
        words[random.randrange(len(words))] = _word(random)
        lines[place] = " ".join(words)


def _change_column(random, lines, _others):
    """The same value in all rows."""
    rows = [i for i, line in enumerate(lines) if len(line.split()) > 2]
    if rows:
        at, value = random.randrange(len(lines[rows[0]].split())), _word(random)
        for place in rows:
            words = lines[place].split()
            if at < len(words):
                words[at] = value
                lines[place] = " ".join(words)


def _rename_column(random, lines, _others):
    places = [i for i, line in enumerate(lines) if line.startswith("_")]
    if places:
        place = random.choice(places)
        lines[place] = re.sub(r"^_\S+", f"_{_name(random)}", lines[place])


def _add_column(random, lines, _others):
    """A column in the header and in all rows after it, as many as it has."""
    places = [i for i, line in enumerate(lines) if line.startswith("_")]
    if places:
        place, value = random.choice(places), random.choice((_word(random), "1.5", "1@images.mrcs"))
        lines.insert(place, f"_{_name(random)}")
        for i in range(place + 1, len(lines)):
            if len(lines[i].split()) > 2:
                lines[i] = f"{value} {lines[i]}"


def _splice(random, text, others):
    other = random.choice(others)
    return text[: random.randrange(len(text) + 1)] + other[random.randrange(len(other) + 1) :]


def _repeat_block(random, text, _others):
    blocks = re.split(r"(?m)^(?=data_)", text)
    place = random.randrange(len(blocks))
    kind = random.randrange(3)
    if kind == 0:
        blocks.insert(place, blocks[place])
    elif kind == 1:
        del blocks[place]
    else:
        random.shuffle(blocks)
    return "".join(blocks)


def _rename_block(random, text, _others):
    name = random.choice(
        ("data_optics", "data_particles", "data_", "data_" + "y" * 10_000, "data_x\x1b[2J", "data_a b")
    )
    return re.sub(r"(?m)^data_\S*", lambda found: random.choice((found.group(), name)), text)


def _other_line_ends(random, text, _others):
    return text.replace("\n", random.choice(("\r\n", "\r", "\n\r", "\n\n", "\x0b", "\x85", "\u2028")))


def _insert_characters(random, text, _others):
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice((_word(random), chr(random.randrange(0xD800)), "\ud800", "\0")) + text[at:]


def _cut_short(random, text, _others):
    return text[: random.randrange(len(text) + 1)]


def _much_of_one_thing(random, text, _others):
    """Long lines and long headers, for what takes time or memory by the square of them."""
    n = random.choice((2_000, 20_000))
    much = random.choice(
        (
            lambda: "'a " * n,
            lambda: '"' * n,
            lambda: "\n" * n,
            lambda: " \t" * n,
            lambda: "".join(f"_c{i}\n" for i in range(n // 2)),
            lambda: "".join(f"_i{i} 1\n" for i in range(n // 2)),
            lambda: "[," * n,
            lambda: "#" * n,
            lambda: "1 " * n,
            lambda: "".join(f"data_b{i}\nloop_\n_x\n1\n" for i in range(n // 10)),
            lambda: "d/" * n,
        )
    )()
    at = random.randrange(len(text) + 1)
    at = text.find("\n", at) + 1 if random.random() < 0.6 else at
    return text[:at] + much + text[at:]


# Those of which one in two inputs is still read stand more than once.
_TEXT = [
    *[_on_lines(change) for change in (_cut_line, _repeat_line, _swap_lines, _insert_line, _join_lines, _split_line)],
    *[_on_lines(change) for change in (_change_words, _change_words, _rename_column, _add_column, _add_column)],
    *[_on_lines(change) for change in (_change_cell, _change_cell, _change_cell, _change_column)],
    _splice,
    _repeat_block,
    _rename_block,
    _other_line_ends,
    _insert_characters,
    _cut_short,
]
_RARE = (_much_of_one_thing,)


def rarely_large_text(random, text, others):
    return random.choice(_RARE)(random, text, others)


# ------------------------------------------------------------------------------ bytes

_EXTREMES = [
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**24,
    -(2**24),
    2**31 - 1,
    -(2**31),
    1000,
    7,
    8,
    9,
    0x44440000,
]
_REALS = [0.0, -0.0, -1.0, 1.0, float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 1e16, 1e20]


def mutated_bytes(random, content, others):
    """Some mutations of any bytes."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(8)
        if kind <= 2 and data:
            data[at % len(data)] = random.choice(
                (0, 255, random.randrange(256), data[at % len(data)] ^ 1 << random.randrange(8))
            )
        elif kind == 3:
            data[at:at] = random.randbytes(random.choice((1, 2, 7, 64)))
        elif kind == 4:
            del data[at : at + random.choice((1, 4, 100))]
        elif kind == 5 and random.random() < 0.4:
            del data[at:]
        elif kind == 6:
            other = random.choice(others)
            start = random.randrange(len(other) + 1)
            data[at : at + random.choice((0, 16, len(data)))] = other[
                start : start + random.choice((4, 64, len(other)))
            ]
        else:
            data[at : at + 4] = struct.pack(random.choice("<>") + "i", random.choice(_EXTREMES))
    return bytes(data)


def mutated_mrc(random, content, others):
    """Changed fields of the header, other byte orders, other lengths, compression."""
    compressed = content[:2] in (b"\x1f\x8b", b"BZ")
    data = bytearray(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    if content[:2] == b"BZ":
        data = bytearray(bz2.decompress(content))
    for _ in range(random.choice((1, 1, 2, 3))):
        _change_header(random, data)
    kind = random.random()
    if kind < 0.15:
        data = bytearray(mutated_bytes(random, data, others))
    elif kind < 0.25:
        data = data[: random.randrange(len(data) + 1)]
    elif kind < 0.3:
        data += bytes(random.choice((1, 4, 100, 100_000)))
    if compressed or random.random() < 0.15:
        return _compressed(random, bytes(data))
    return bytes(data)


def _compressed(random, data):
    if random.random() < 0.1:
        data += bytes(8_000_000)
    packed = gzip.compress(data, 1, mtime=0) if random.random() < 0.6 else bz2.compress(data, 1)
    kind = random.random()
    if kind < 0.2:
        packed = mutated_bytes(random, packed, [packed])
    elif kind < 0.4:
        packed = packed[: random.randrange(len(packed) + 1)]
    elif kind < 0.5:
        packed += packed
    return packed


def _change_header(random, data):
    order = random.choice("<<<>")
    kind = random.randrange(8)
    if len(data) < 1024 or kind == 0:
        return
    if kind == 1:  # the header alone in the other byte order
        words = np.frombuffer(bytes(data[:208]), dtype="<u4").byteswap()
        data[:208] = words.tobytes()
    elif kind == 2:
        data[208:216] = random.choice((b"MAP\0DA\0\0", bytes(8), b"MAP D\0\0\0", b"MAP D\x11\0\0", b"MAP D   ",
                                       b"MAP \x11\x11\0\0", b"MAP DD\0\0", random.randbytes(8)))  # fmt: skip
    elif kind == 3:
        at = random.choice((40, 44, 48, 52, 76, 80, 84, 196, 200, 204, 216))
        data[at : at + 4] = struct.pack(order + "f", random.choice(_REALS))
    elif kind == 4:
        at = 12
        data[at : at + 4] = struct.pack(order + "i", random.choice((0, 1, 2, 3, 4, 5, 6, 12, 101, -1, 2**30)))
    elif kind == 5 and len(data) >= 1032:
        at = random.randrange(1024, len(data) - 4)
        data[at : at + 4] = struct.pack(order + "f", random.choice(_REALS))
    else:
        at = random.choice((0, 4, 8, 12, 28, 32, 36, 64, 68, 72, 88, 92, 92, 96, 104, 108))
        data[at : at + 4] = struct.pack(order + "i", random.choice(_EXTREMES))


def mutated_dataset(random, content, others):
    """Another text in the header of a NumPy file, or other bytes."""
    if not content.startswith(b"\x93NUMPY") or random.random() < 0.35:
        return mutated_bytes(random, content, others)
    length = struct.unpack("<H", content[8:10])[0]
    text, rest = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    for _ in range(random.choice((1, 1, 2, 4))):
        text = random.choice(_HEADER)(random, text)
    new = text.encode("latin1", errors="replace")
    if random.random() < 0.7 and len(new) < 65_000:
        length = len(new)
    if random.random() < 0.2:
        rest = rest[: random.randrange(len(rest) + 1)] if random.random() < 0.5 else rest * 3
    return content[:8] + struct.pack("<H", length) + new + rest


def _replace_one(pattern, values):
    def mutation(random, text):
        found = list(re.finditer(pattern, text))
        if not found:
            return text
        one = random.choice(found)
        return text[: one.start()] + random.choice(values) + text[one.end() :]

    return mutation


_TYPES = ["'<f4'", "'<f8'", "'>f4'", "'|S1'", "'|S0'", "'<U3'", "'|O'", "'|V4'", "'<c8'", "'<M8[s]'", "'|b1'", "'<u8'",
          "'<i8'", "'<f2'", "'<f16'", "'<i4', (0,)", "'<f4', (3,)", "'<f4', (2, 2)", "[('a', '<f4')]", "'|V0'", "''",
          "'<f4', (-1,)", "'<f4', (4294967296,)", "'S99999999999'", "None"]  # fmt: skip
_SHAPES = ["(0,)", "(1,)", "(4,)", "(6,)", "()", "(5, 1)", "(-1,)", f"({10**15},)", f"({2**62},)", f"({2**63},)",
           f"({2**31},)", "(5.0,)", "(True,)", "5", "('5',)", "(" * 300, "[5]", "None", "(1e3,)"]  # fmt: skip
_FIELDS = ["'uid'", "'blob/path'", "'blob/idx'", "'alignments3D/pose'", "'alignments3D/shift'", "''", "'x\\n'", "5",
           "'ctf/cs_mm'", "'blob/psize_A'", "('title', 'uid')", "'\\x1b[2J'", "'" + "f" * 9000 + "'"]  # fmt: skip
_HEADER = [
    _replace_one(r"'[<>|][a-zA-Z]\d+'(, \(\d+,\))?", _TYPES),
    _replace_one(r"'[<>|][a-zA-Z]\d+'(, \(\d+,\))?", _TYPES),
    _replace_one(r"(?<='shape': )\([^)]*\)", _SHAPES),
    _replace_one(r"'\w+(/\w+)?'", _FIELDS),
    _replace_one(r"False", ["True", "None", "1", "0"]),
    _replace_one(r".", ["", "(", ")", "[", "{", "'", ",", "\n", "\0", "9", "-", "x"]),
    _replace_one(r"\('[^)]*\), ", [""]),
]


def mutated_columns(random, columns):
    """Other values, types and shapes of the fields of a dataset."""
    columns = dict(columns)
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(list(columns))
        values = columns[name].copy()
        kind = random.randrange(6)
        if kind <= 1 and values.dtype.kind in "fiu" and values.size:
            extremes = np.array([*_REALS, *map(float, _EXTREMES)])
            with np.errstate(all="ignore"):
                values.flat[random.randrange(values.size)] = extremes[random.randrange(len(extremes))].astype(
                    values.dtype
                )
        elif kind == 2:
            del columns[name]
            if columns:
                continue
        elif kind == 3:
            type_ = random.choice(("f8", "f2", "i8", "u1", "S4", "U4", "c8", "?", "O", ">f4", "V3", "M8[s]"))
            try:
                values = values.astype(type_)
            except (ValueError, TypeError):
                values = np.zeros(len(values), dtype=type_)
        elif kind == 4:
            values = np.zeros((len(values), *random.choice(((), (1,), (2,), (3,), (0,), (2, 2)))), dtype=values.dtype)
        elif values.dtype.kind in "SU":
            longest = np.array(_WORDS + NUMBERS)[random.randrange(len(_WORDS))]
            text = values if values.dtype.kind == "U" else np.char.decode(values, "utf-8", "replace")
            values = text.astype(f"U{len(longest) + 1}")
            values[random.randrange(len(values))] = longest
            values = np.char.encode(values, "utf-8") if random.random() < 0.6 else values
        columns[name] = values
    return columns


# ------------------------------------------------------------------------------ pickles


def mutated_value(random, values):
    """An object in the place of what a pickle of cryoDRGN holds."""
    value = random.choice(values)
    kind = random.randrange(7)
    array = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(array, np.ndarray) or kind == 0:
        return random.choice((None, value, [value], (value, value), {1: value}, "text", b"bytes", 2**70, float("nan")))
    array = array.copy()
    if kind <= 3 and array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            changed = np.float64(random.choice((*_REALS, 1e300, 64.5, 2.0**20)))
            array.flat[random.randrange(array.size)] = changed.astype(array.dtype)
    elif kind == 4:
        with np.errstate(all="ignore"):
            array = array.astype(random.choice(("f2", "f8", "i8", "u1", ">i4", "c8", "?", "O", "S8", "U8", "f16")))
    elif kind == 5:
        array = array.reshape(random.choice(((-1,), (1, *array.shape), array.shape[::-1], (-1, 1))))
    else:
        array = array[: random.randrange(3)]
    return (array, *value[1:]) if isinstance(value, tuple) else array
