"""GGUF files: what is written is read again, and whatever else the bytes are ends in one sentence, not in a crash."""

import errno
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zero2llm.interop.gguf import file as gguf_file
from zero2llm.interop.gguf.blocks import KINDS, PACK
from zero2llm.interop.gguf.file import open_gguf, write_gguf
from zero2llm.interop.gguf.values import MAX_ELEMENTS, Typed


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def described(name, dims, kind, offset):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, KINDS.get(kind, (kind,))[0], offset)


def built(entries=(), tensors=(), data=b"", version=3, counts=None):
    """A file put together by hand. entries : (key, bytes of type and value)."""
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries)
    head += b"".join(text(key) + raw for key, raw in entries) + b"".join(described(*t) for t in tensors)
    return head + b"\0" * (-len(head) % 32) + data


def u32(value):
    return struct.pack("<II", 4, value)


GOOD = built(
    [("general.architecture", struct.pack("<I", 8) + text("llama")), ("n", u32(7)), ("on", struct.pack("<I?", 7, True)),
     ("words", struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é")), ("ints", struct.pack("<IIQ2i", 9, 5, 2, 1, -1))],
    [("a", (3, 2), "F32", 0), ("b", (32,), "Q8_0", 32)],
    struct.pack("<6f8x", *range(6)) + struct.pack("<e32b", 0.5, *range(32)),
)  # fmt: skip


def opened(tmp_path, raw, name="x.gguf"):
    (tmp_path / name).write_bytes(raw)
    return open_gguf(tmp_path / name)


def test_a_file_by_hand(tmp_path):
    for raw in (GOOD, GOOD.replace(b"GGUF\3", b"GGUF\2")):
        found = opened(tmp_path, raw)
        assert found.metadata == {"general.architecture": "llama", "n": 7, "on": True, "words": ["a", "é"], "ints": [1, -1]}
        a, b = found.tensors["a"], found.tensors["b"]
        assert (a.shape, a.kind, b.shape, b.kind) == ((2, 3), "F32", (32,), "Q8_0")
        assert a.lazy.load().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert b.lazy.load().tolist() == [i / 2 for i in range(32)]
        assert len(b.raw()) == 34 and b.lazy.dtype == torch.float32


# Files that are not whole.


def test_cut_anywhere_is_one_sentence(tmp_path):
    for end in range(len(GOOD)):
        with pytest.raises(ValueError, match=r"x\.gguf: "):
            opened(tmp_path, GOOD[:end])


def everything(tmp_path, raw):
    """Opens and loads all there is; only ValueError may come out, and nothing much larger than the file is reserved."""
    tracemalloc.start()
    try:
        for tensor in opened(tmp_path, raw).tensors.values():
            tensor.lazy.load()
    except ValueError as error:
        assert "x.gguf" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(tmp_path, flips):
    raw = bytearray(GOOD)
    for at, mask in flips:
        raw[at] ^= mask
    everything(tmp_path, bytes(raw))


@FUZZ
@given(at=st.integers(4, len(GOOD) - 8), value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]))
def test_giant_numbers_anywhere(tmp_path, at, value):
    everything(tmp_path, GOOD[:at] + struct.pack("<Q", value) + GOOD[at + 8 :])


@FUZZ
@given(tail=st.binary(max_size=200))
def test_any_bytes_after_the_counts(tmp_path, tail):
    everything(tmp_path, GOOD[:24] + tail)
    everything(tmp_path, tail)


F32 = ("a", (3, 2), "F32", 0)
DATA = bytes(24)
HUGE = 1 << 60
DAMAGED = {
    "empty": (b"", "is no GGUF file, it begins with b''"),
    "a web page": (b"<!DOCTYPE html>", "is no GGUF file, it begins with b'<!DO'"),
    "version 1": (built(version=1), "version 1; only little-endian GGUF of version 2 or 3"),
    "version 4": (built(version=4), "version 4; only"),
    "big endian": (built(version=3 << 24), "it is big endian; only little-endian"),
    "tensors": (built([("ab", u32(1))], counts=(HUGE, 1))[:42], "the name of tensor 1 of 1152921504606846976 at byte 42 needs 8 bytes, but the file ends at byte 42"),
    "entries": (built(counts=(0, HUGE))[:24], "key 1 of .* needs 8 bytes, but the file ends at byte"),
    "key": (built([("", u32(1))]), "metadata key 1 is empty"),
    "keys": (built([("n", u32(1)), ("n", u32(1))]), "metadata key 'n' occurs twice"),
    "string": (built([("n", struct.pack("<IQ", 8, HUGE))]), "metadata 'n' claims a string of 1152921504606846976 bytes"),
    "string past the end": (built([("n", struct.pack("<IQ", 8, 1000))]), "metadata 'n' at byte 45 needs 1000 bytes, but the file ends"),
    "no UTF-8": (built([("n", struct.pack("<IQ", 8, 2) + b"\xff\xfe")]), "metadata 'n' is no UTF-8"),
    "type": (built([("n", struct.pack("<II", 13, 0))]), "metadata 'n' has type 13, which GGUF does not know"),
    "bool": (built([("n", struct.pack("<IB", 7, 2))]), "metadata 'n' has a boolean that is neither 0 nor 1"),
    "array": (built([("n", struct.pack("<IIQ", 9, 4, HUGE))]), "metadata 'n' claims 1152921504606846976 elements of type uint32"),
    "strings": (built([("n", struct.pack("<IIQ", 9, 8, 99) + bytes(64))]), "metadata 'n' claims 99 elements of type string"),
    "many": (built([("n", struct.pack("<IIQ", 9, 0, MAX_ELEMENTS + 1) + bytes(MAX_ELEMENTS + 1))]), "elements of type uint8, more than"),
    "nested": (built([("n", struct.pack("<IIQ", 9, 9, 1))]), "metadata 'n' is an array of arrays"),
    "no name": (built(tensors=[("", (1,), "F32", 0)], data=DATA), "tensor 1 has no name"),
    "names": (built(tensors=[F32, F32], data=DATA), "tensor 'a' occurs twice"),
    "dimensions": (built(tensors=[("a", (1,) * 5, "F32", 0)], data=DATA), "tensor a has 5 dimensions, more than 4"),
    "empty tensor": (built(tensors=[("a", (3, 0), "F32", 0)], data=DATA), r"tensor a of shape \(0, 3\) is at 0: empty"),
    "size": (built(tensors=[("a", (1 << 40, 1 << 40), "F32", 0)], data=DATA), "tensor a ends at byte .*, but the file ends at byte"),
    "kind": (built(tensors=[("a", (1,), 4, 0)], data=DATA), "tensor a is stored as kind 4, which is unknown"),
    "row": (built(tensors=[("a", (33,), "Q8_0", 0)], data=DATA), "tensor a: rows of 33 weights do not divide into Q8_0's blocks of 32"),
    "offset": (built(tensors=[("a", (1,), "F32", 8)], data=DATA), "tensor a .* not at a multiple of 32"),
    "beyond": (built(tensors=[("a", (1,), "F32", HUGE)], data=DATA), "tensor a ends at byte .*, but the file ends at byte"),
    "overlap": (built(tensors=[F32, ("b", (1,), "F32", 0)], data=DATA), "tensor b .* over another"),
    "alignment": (built([("general.alignment", u32(24))]), "general.alignment is 24, not a power of two"),
    "alignment type": (built([("general.alignment", struct.pack("<I", 8) + text("32"))]), "general.alignment is '32', not a power"),
    "split": (built([("split.count", struct.pack("<I", 8) + text("3"))]), "split.count is '3', not a number of files"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named(tmp_path, what):
    raw, match = DAMAGED[what]
    with pytest.raises(ValueError, match=match) as found:
        opened(tmp_path, raw)
    assert str(tmp_path / "x.gguf") in str(found.value) and "\n" not in str(found.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no.gguf: cannot be read"):
        open_gguf(tmp_path / "no.gguf")
    with pytest.raises(ValueError, match="cannot be read"):
        open_gguf(tmp_path)


def test_a_kind_that_is_not_supported_is_named_when_it_is_loaded(tmp_path):
    found = opened(tmp_path, built([("n", u32(7))], [("a", (256, 2), "IQ4_XS", 0), ("b", (1,), "F32", 288)], bytes(292)))
    assert found.metadata == {"n": 7} and found.tensors["a"].kind == "IQ4_XS" and len(found.tensors["a"].raw()) == 272
    assert found.tensors["b"].lazy.load().tolist() == [0]
    with pytest.raises(ValueError, match=r"x.gguf: tensor a is stored as IQ4_XS, which cannot be read; these can: F32, F16"):
        found.tensors["a"].lazy.load()


def test_a_file_that_shrinks_or_goes_after_it_was_opened(tmp_path):
    tensor = opened(tmp_path, GOOD).tensors["b"]
    (tmp_path / "x.gguf").write_bytes(GOOD[:-1])
    with pytest.raises(ValueError, match="tensor b is cut short"):
        tensor.lazy.load()
    (tmp_path / "x.gguf").unlink()
    with pytest.raises(ValueError, match="tensor b cannot be read"):
        tensor.lazy.load()


# Several files.


def parts(tmp_path, count=3, **wrong):
    """A model of ``count`` files with one tensor each; wrong : fields of the second."""
    for i in range(count):
        said = {"split.no": i, "split.count": count} | (wrong if i == 1 else {})
        name = said.pop("name", f"t{i}")
        entries = [(key, struct.pack("<IH", 2, value)) for key, value in said.items()]
        entries += [("split.tensors.count", struct.pack("<Ii", 5, count)), ("n", u32(i))]
        (tmp_path / f"m-{i + 1:05d}-of-{count:05d}.gguf").write_bytes(built(entries, [(name, (6,), "F32", 0)], struct.pack("<6f", *[i] * 6)))
    return tmp_path / f"m-00001-of-{count:05d}.gguf"


def test_a_model_in_three_files(tmp_path):
    found = open_gguf(parts(tmp_path))
    assert found.metadata["n"] == 0 and list(found.tensors) == ["t0", "t1", "t2"]
    assert [t.lazy.load()[0].item() for t in found.tensors.values()] == [0, 1, 2]


def test_files_that_do_not_belong_together(tmp_path):
    first = parts(tmp_path)
    second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (2, 3))
    with pytest.raises(ValueError, match="m-00002-of-00003.gguf: is not the first of 3 files; open m-00001-of-00003.gguf"):
        open_gguf(second)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="is one of 3 files, which must be called NAME-00001-of-00003.gguf"):
        open_gguf(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").rename(first)
    second.unlink()
    third.unlink()
    with pytest.raises(ValueError, match="2 of 3 files are missing: m-00002-of-00003.gguf, m-00003-of-00003.gguf"):
        open_gguf(first)
    for wrong in ({"split.no": 2}, {"split.count": 4}):
        with pytest.raises(ValueError, match="m-00002-of-00003.gguf: does not say that it is file 2 of 3"):
            open_gguf(parts(tmp_path, **wrong))
    with pytest.raises(ValueError, match="m-00002-of-00003.gguf: repeats tensors of the files before it: t0"):
        open_gguf(parts(tmp_path, name="t0"))
    parts(tmp_path)
    third.write_bytes(built([("split.no", struct.pack("<IH", 2, 2)), ("split.count", struct.pack("<IH", 2, 3))]))
    with pytest.raises(ValueError, match="the model has 3 tensors, but its 3 files hold 2"):
        open_gguf(first)


# Writing.


def test_what_is_written_is_read(tmp_path):
    torch.manual_seed(0)
    metadata = {
        "general.alignment": 64, "s": "é", "i": 2**32 - 1, "f": 0.5, "b": False, "words": ["a", ""], "ints": [-1, 2], "floats": [0.5],
        "flags": (True, False), "none": Typed("string", []), "wide": Typed("int64", -(2**63)), "bytes": Typed("uint8", [0, 255]),
    }  # fmt: skip
    values = {kind: torch.randn(3, 2, 64) for kind in PACK} | {"scalar": torch.tensor(2.5), "half": torch.randn(5).half()}
    tensors = [(name, tuple(t.shape), name if name in PACK else "F32", lambda t=t: t) for name, t in values.items()]
    write_gguf(tmp_path / "deep" / "x.gguf", metadata, tensors)
    found = open_gguf(tmp_path / "deep" / "x.gguf")
    plain = {key: value.value if isinstance(value, Typed) else value for key, value in metadata.items()}
    assert found.metadata == plain | {"flags": [True, False]}
    for name, value in values.items():
        loaded = found.tensors[name].lazy.load()
        assert loaded.shape == value.shape
        if name in ("F32", "scalar", "half"):
            assert torch.equal(loaded, value.float())
        elif name in ("F16", "BF16"):
            assert torch.equal(loaded, value.to(found.tensors[name].lazy.dtype))
        else:
            assert (loaded - value).abs().max() < {"4": 0.6, "5": 0.3, "8": 0.03}[name[1]]
    write_gguf(tmp_path / "again.gguf", metadata, [(n, s.shape, s.kind, s.lazy.load) for n, s in found.tensors.items()])
    copies = open_gguf(tmp_path / "again.gguf").tensors
    for name in ("F32", "F16", "BF16", "scalar", "half"):
        assert (copies[name].raw() == found.tensors[name].raw()).all()


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Each is asked for when the one before it is on disk, and packed in pieces."""
    monkeypatch.setattr(gguf_file, "STEP", 1 << 12)
    sizes = []

    def load(i):
        sizes.append(sum(p.stat().st_size for p in tmp_path.iterdir()))
        return torch.full((640, 512), float(i))

    write_gguf(tmp_path / "x.gguf", {}, [(str(i), (640, 512), "F32", lambda i=i: load(i)) for i in range(3)])
    assert all(size >= i * 1_200_000 for i, size in enumerate(sizes)) and len(sizes) == 3  # of 1,310,720 bytes each
    assert [t.lazy.load().unique().tolist() for t in open_gguf(tmp_path / "x.gguf").tensors.values()] == [[0], [1], [2]]


def refuse_to_load():
    raise AssertionError("loaded")


WRONG = {
    "name twice": ({}, [("a", (2,), "F32"), ("a", (2,), "F32")], "tensor 'a': named twice"),
    "no name": ({}, [("", (2,), "F32")], "a name has 1 to 63 bytes"),
    "long name": ({}, [("a" * 64, (2,), "F32")], "a name has 1 to 63 bytes"),
    "kind": ({}, [("a", (256,), "Q4_K")], "tensor a: Q4_K cannot be written; these can: F32"),
    "row": ({}, [("a", (2, 33), "Q8_0")], "tensor a: rows of 33 weights do not divide into Q8_0's blocks of 32; store it as F16"),
    "dimensions": ({}, [("a", (1,) * 5, "F32")], "tensor a: GGUF cannot hold the shape"),
    "empty": ({}, [("a", (0, 2), "F32")], "tensor a: GGUF cannot hold the shape"),
    "alignment": ({"general.alignment": 12}, [], "general.alignment = 12: must be a power of two"),
    "negative": ({"n": -1}, [], "metadata 'n': -1 does not fit uint32 .*Typed names another type"),
    "wide": ({"n": 2**32}, [], "metadata 'n': 4294967296 does not fit uint32"),
    "wide element": ({"n": [1, 2**31]}, [], "metadata 'n': 2147483648 does not fit int32"),
    "wide float": ({"n": 1e39}, [], r"metadata 'n': 1e\+39 does not fit float32"),
    "mixed": ({"n": [1, 2.5]}, [], "metadata 'n': a list must hold only bools, only ints"),
    "nothing": ({"n": []}, [], "metadata 'n': a list must hold only .*Typed names its type"),
    "None": ({"n": None}, [], "metadata 'n': None is a NoneType, which GGUF cannot hold"),
    "dict": ({"n": {}}, [], "metadata 'n': {} is a dict"),
    "nested": ({"n": [[1]]}, [], "metadata 'n': a list must hold only"),
    "not said": ({"n": Typed("uint64", 1.5)}, [], "metadata 'n': 1.5 is no uint64"),
    "bool as number": ({"n": Typed("int32", [True])}, [], "metadata 'n': True is no int32"),
    "number as bool": ({"n": Typed("bool", 1)}, [], "metadata 'n': 1 is no bool"),
    "surrogate": ({"n": "\ud800"}, [], "metadata 'n': .* does not fit string"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_written_is_said_before_anything_is_loaded(tmp_path, what):
    metadata, tensors, match = WRONG[what]
    with pytest.raises(ValueError, match=match):
        write_gguf(tmp_path / "x.gguf", metadata, [(*t, refuse_to_load) for t in tensors])
    assert not list(tmp_path.iterdir())


def test_no_such_type():
    with pytest.raises(ValueError, match="no metadata type 'int'; it has uint8"):
        Typed("int", 3)


def nan():
    return torch.full((1, 32), torch.nan)


def interrupted():
    raise KeyboardInterrupt


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("load", "error", "match"), [
    (nan, ValueError, "tensor b: holds a value that is nan or infinite"),
    (lambda: torch.zeros(1, 31), ValueError, r"tensor b: has shape \(1, 31\), not \(1, 32\) as was said"),
    (full_disk, ValueError, "no space left while writing .*x.gguf"),
    (interrupted, KeyboardInterrupt, None),
])  # fmt: skip
def test_a_failure_leaves_what_was_there(tmp_path, load, error, match):
    path = tmp_path / "x.gguf"
    tensors = [("a", (1, 32), "Q8_0", lambda: torch.zeros(1, 32)), ("b", (1, 32), "Q8_0", load)]
    with pytest.raises(error, match=match):
        write_gguf(path, {}, tensors)
    assert not list(tmp_path.iterdir())
    path.write_bytes(GOOD)
    with pytest.raises(error, match=match):
        write_gguf(path, {}, tensors, overwrite=True)
    assert path.read_bytes() == GOOD and list(tmp_path.iterdir()) == [path]


def test_a_file_that_exists_is_kept(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(GOOD)
    with pytest.raises(ValueError, match="x.gguf already exists; choose another place or pass --overwrite"):
        write_gguf(path, {}, [("a", (1,), "F32", refuse_to_load)])
    assert path.read_bytes() == GOOD
    write_gguf(path, {"n": 1}, [], overwrite=True)
    assert open_gguf(path).metadata == {"n": 1}
