"""Files of torch.save are read without running anything in them; what cannot be read is one error that names the file."""

import collections
import io
import json
import pickle
import sys
import zipfile

import pytest
import torch

from zero2llm.interop import torch_files
from zero2llm.interop.torch_files import is_torch, open_bin, open_torch, read_torch


class Trap:
    """Unpickled by an ordinary loader, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Shell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return (os.system, (f"touch '{self.path}'",))


def weights(seed=0):
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(4).half(), "c": torch.arange(6).view(2, 3)}


def refused(path):
    """The error's text: one ValueError that names the file."""
    with pytest.raises(ValueError) as caught:
        open_torch(path)
    assert str(path) in str(caught.value) and caught.value.__cause__ is None
    return str(caught.value)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape) and found[name].dtype == tensor.dtype
        assert torch.equal(found[name].load(), tensor), name


def test_state_dict(tmp_path):
    torch.save(weights(), tmp_path / "a.pth")
    tensors, rest = open_torch(tmp_path / "a.pth")
    same(tensors, weights())
    assert rest == {}
    torch.save(torch.nn.Linear(3, 2).requires_grad_().state_dict(), tmp_path / "a.pth")  # an OrderedDict
    assert list(open_torch(tmp_path / "a.pth")[0]) == ["weight", "bias"]
    torch.save(dict(torch.nn.Linear(3, 2).named_parameters()), tmp_path / "a.pth")
    assert not open_torch(tmp_path / "a.pth")[0]["weight"].load().requires_grad


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_nested(key, tmp_path):
    data = {key: weights(), "model_args": {"n_head": 4, "bias": False}, "iter_num": 7, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}
    torch.save(data, tmp_path / "ckpt.pt")
    tensors, rest = open_torch(tmp_path / "ckpt.pt")
    same(tensors, weights())
    assert rest["model_args"] == {"n_head": 4, "bias": False} and set(rest) == set(data) - {key}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed_and_said(prefix, tmp_path):
    torch.save({prefix + name: t for name, t in weights().items()}, tmp_path / "a.pth")
    found = read_torch(tmp_path / "a.pth")
    same(found.tensors, weights())
    assert len(found.notes) == 1 and all(part + "." in found.notes[0] for part in prefix.split(".")[:-1])


def test_a_prefix_that_not_all_names_have_is_a_name(tmp_path):
    torch.save({"module.a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "a.pth")
    found = read_torch(tmp_path / "a.pth")
    assert set(found.tensors) == {"module.a", "b"} and found.notes == ()


def test_tied_tensors_and_views(tmp_path):
    """Two names of one tensor are both there, and what a reader does to one reaches neither the other nor the file."""
    table, wide = torch.randn(6, 4), torch.randn(8, 8)
    state = {"embed": table, "head": table, "part": wide[2:4, ::2], "turned": wide.t(), "spread": torch.ones(1, 3).expand(5, 3)}
    path = tmp_path / "a.pth"
    torch.save(state, path)
    before = path.read_bytes()
    tensors, _ = open_torch(path)
    same(tensors, state)
    tensors["embed"].load().zero_()
    same(tensors, state)
    assert path.read_bytes() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_values_are_mapped_not_read(tmp_path):
    """Opening 64 MB takes less than 20 MB of memory."""

    def rss():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    torch.save({str(i): torch.full((1 << 22,), float(i)) for i in range(4)}, tmp_path / "big.pth")
    start = rss()
    tensors, _ = open_torch(tmp_path / "big.pth")
    assert rss() - start < 20
    assert sum(t.nbytes for t in tensors.values()) == 1 << 26


@pytest.mark.parametrize("trap", [Trap, Shell])
@pytest.mark.parametrize("nested", [False, True])
def test_code_is_not_run(trap, nested, tmp_path):
    made = tmp_path / "made"
    data = weights() | {"x": trap(made)}
    torch.save({"model": weights(), "extra": trap(made)} if nested else data, tmp_path / "a.pth")
    said = refused(tmp_path / "a.pth")
    assert "code and not weights" in said and "nothing in it was run" in said and ("open" in said or "system" in said)
    assert not made.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # the trap works
    assert made.exists()


def test_plain_and_old_pickles_are_not_even_looked_at(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": Trap(made)}))
    assert "no zip archive" in refused(tmp_path / "a.pkl")
    torch.save(weights() | {"x": Trap(made)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    said = refused(tmp_path / "a.pth")
    assert "nothing in it was run" in said and torch_files.RESAVE in said
    assert not made.exists()


def test_the_advice_for_old_files_works(tmp_path):
    torch.save(weights(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth")
    names = {"torch": torch, "FILE": tmp_path / "old.pth", "NEW_FILE": tmp_path / "new.pth"}
    exec(torch_files.RESAVE, names)
    same(open_torch(tmp_path / "new.pth")[0], weights())


def test_cut_short_anywhere(tmp_path):
    torch.save(weights(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for n in (0, 1, 3, 4, 30, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        (tmp_path / "a.pth").write_bytes(whole[:n])
        said = refused(tmp_path / "a.pth")
        assert "cut short" in said if n >= 4 else "empty" in said or "no zip" in said


def test_damaged_anywhere(tmp_path):
    """A flipped byte is an error of ours, or a value: never another exception."""
    path, state = tmp_path / "a.pth", weights()
    torch.save(state, path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            for tensor in open_torch(path)[0].values():
                tensor.load()
        except ValueError as error:
            assert str(path) in str(error)


def archive(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as made:
        for name, content in files.items():
            made.writestr(name.replace("__", "/"), content)
    return data.getvalue()


def test_no_state_dict(tmp_path):
    path = tmp_path / "a.pth"
    for data, says in (
        ([torch.ones(2)], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "holds: nothing"),
        ({"epoch": 3, "lr": 0.1}, "it holds: epoch (int), lr (float)"),
        ({"model": {}, "args": {"a": 1}}, "neither itself nor under model"),
        ({"a": torch.ones(2), "b": 3}, "b (int)"),
        ({1: torch.ones(2)}, "1 (Tensor)"),
    ):
        torch.save(data, path)
        assert says in refused(path), says
    path.write_bytes(archive(x="hello"))
    assert "cannot be read as weights" in refused(path)
    torch.save(torch.nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear, which is code" in refused(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in refused(path)
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "no such file" in refused(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_unusual_kinds(tmp_path):
    path = tmp_path / "a.pth"
    for tensor, says in (
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, device="meta"), "on meta"),
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        (torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
    ):
        torch.save({"a": torch.ones(2), "odd": tensor}, path)
        said = refused(path)
        assert "tensor odd is stored as" in said and says in said


def test_is_torch(tmp_path):
    made = {"a.pth": weights(), "ckpt.pt": {"model": weights()}}
    for name, data in made.items():
        torch.save(data, tmp_path / name)
        assert is_torch(tmp_path / name)
    torch.save(weights(), tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "zip").write_bytes(archive(a__b="text"))
    (tmp_path / "docx").write_bytes(archive(word__document="text"))
    (tmp_path / "text").write_text("{}")
    (tmp_path / "empty").touch()
    assert not any(is_torch(tmp_path / name) for name in ("old", "zip", "docx", "text", "empty", "none", "."))


def test_folder_of_bin_files(tmp_path):
    state = weights()
    torch.save(collections.OrderedDict(state), tmp_path / "pytorch_model.bin")
    same(open_bin(tmp_path), state)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin: no such file"):
        open_bin(tmp_path)
    files = {name: f"pytorch_model-{i + 1:05d}-of-00002.bin" for i, name in enumerate(("a.weight", "b.weight"))} | {"c": "pytorch_model-00002-of-00002.bin"}
    for file in set(files.values()):
        torch.save({name: state[name] for name in files if files[name] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    same(open_bin(tmp_path), state)
    index.write_text(json.dumps({"weight_map": files | {"d": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(ValueError, match="lists tensors that its files lack: d"):
        open_bin(tmp_path)
    index.write_text(json.dumps({"weight_map": files | {"d": "../d.bin"}}))
    with pytest.raises(ValueError, match="must name a file of this folder"):
        open_bin(tmp_path)
    index.write_text(json.dumps({"weight_map": files}))
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="1 of 2 weight files are missing: pytorch_model-00001"):
        open_bin(tmp_path)
