"""Checkpoints: folders that are complete or absent, hashed, and enough to continue bit for bit.

    step-00000120/
        model/model.safetensors   config.json (model, resolved; format version)   tokenizer/
    generation_config.json    of a model that was imported: stop tokens, sampling defaults; its descendants carry it on
        train/optim.safetensors   train/rng.safetensors   train/state.json (step, tokens, scale, data cursor)
        manifest.json             sha256 of every file, parent, metrics: written last

Optimizer state is stored whole, by parameter name, as safetensors: it loads into any number of ranks, and unlike
torch.distributed.checkpoint, whose index file is a pickle, reading it can run no code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zero2llm.adapters.wrap import unwrap
from zero2llm.core.config import parse, to_dict
from zero2llm.core.device import Undrawn
from zero2llm.core.files import hashes, load_tensors, new_folder, read_json, save_tensors, sha256
from zero2llm.core.log import log_once
from zero2llm.core.seeds import restore_rng, rng_state
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.build import OptimizerSet
from zero2llm.train.adapted import AdapterRun, dress, learned, load_learned, weights_hash
from zero2llm.train.fit import FitState

FORMAT = 1
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest was read; `verify` compares every hash."""

    path: Path
    manifest: dict

    @staticmethod
    def open(path: str | Path, resuming: bool = True) -> Checkpoint:
        """``path`` may be a checkpoint, or a run folder: then its latest intact checkpoint.

        ``resuming`` False: the optimizer's files, which only training reads, are not checked. Raises ValueError for a folder that is none, another format version, or damage.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such checkpoint folder")
        if not (path / "manifest.json").is_file():
            found = latest(path, resuming)
            if found is None:
                raise ValueError(f"{path}: neither a checkpoint (no manifest.json) nor a run with intact checkpoints")
            return found
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path}: checkpoint format {manifest.get('format')!r}, this version of zero2llm reads {FORMAT}"
            )
        return Checkpoint(path, manifest).verify(resuming)

    def verify(self, resuming: bool = True) -> Checkpoint:
        for name, expected in self.manifest["sha256"].items():
            file = self.path / name
            if name.startswith("train/") and not resuming:
                continue
            if not file.is_file():
                raise ValueError(f"{file}: listed in the manifest but missing; the checkpoint is damaged")
            if sha256(file) != expected:
                raise ValueError(f"{file}: its sha256 differs from the manifest's; the checkpoint is damaged")
        return self

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    def model_config(self) -> ModelConfig:
        data = read_json(self.path / "config.json")
        return parse(ModelConfig, data["model"], source=str(self.path / "config.json"))

    def adapter(self) -> AdapterRun | None:
        """What the checkpoint is an adapter of, if it is one."""
        data = read_json(self.path / "config.json").get("adapter")
        return None if data is None else parse(AdapterRun, data, source=str(self.path / "config.json"))

    def load_model(self, base: str | Path | None = None) -> LM:
        """The model in evaluation mode, in fp32 on the CPU; an adapter is merged into its base.

        Weights are pages of the file, read when they are first needed; writing to them changes this process alone.
        base : where an adapter's base lies, if not where it was trained.
        """
        if self.adapter() is not None:
            return unwrap(self.load_adapted(base)).requires_grad_(True).eval()
        if base is not None:
            raise ValueError(f"{self.path} is a whole model and needs no base")
        with torch.device("meta"), Undrawn():  # nothing is drawn that would be overwritten
            model = LM(self.model_config())
        tensors = load_tensors(self.path / "model")
        load_weights(model, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, str(self.path), assign=True)
        return model.eval()

    def load_adapted(self, base: str | Path | None = None) -> LM:
        """The base with the adapter beside it. Raises ValueError if the base is gone, or is another model."""
        run = self.adapter()
        path = Path(base or run.base)
        if not path.is_dir():
            raise ValueError(f"{self.path} is an adapter of {path}, which is not there; say where its base lies (--base)")
        found = Checkpoint.open(path, resuming=False)
        if weights_hash(found.manifest) != run.base_weights:
            raise ValueError(f"{self.path} is an adapter of other weights than those of {found.path}; say where its base lies (--base)")
        model = dress(found.load_model(), run)
        load_learned(model, run, load_tensors(self.path / "model"))
        model.cfg = self.model_config()  # with the score head that the base may lack
        return model.eval()

    def restore(self, model: nn.Module, optim: OptimizerSet, batches) -> FitState:
        """Put everything back where it was; the next step is the one that would have followed."""
        if (run := self.adapter()) is not None:
            load_learned(model, run, load_tensors(self.path / "model"))
        else:
            load_weights(model, load_tensors(self.path / "model"), str(self.path))
        optim.load_state_tensors(load_tensors(self.path / "train", "optim"))
        state = read_json(self.path / "train" / "state.json")
        batches.load_state_dict(state["data"])
        restore_rng(load_tensors(self.path / "train", "rng"))
        return FitState(**state["fit"])


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str, assign: bool = False) -> None:
    """Strictly: a missing, extra or mis-shaped tensor is an error that lists names."""
    own = model.state_dict()
    faults = [f"missing {n}" for n in own if n not in tensors] + [f"unexpected {n}" for n in tensors if n not in own]
    faults += [
        f"{n} is {tuple(tensors[n].shape)}, the model needs {tuple(own[n].shape)}"
        for n in own
        if n in tensors and tensors[n].shape != own[n].shape
    ]
    if faults:
        raise ValueError(
            f"{source}: weights do not fit the model: {'; '.join(faults[:8])}{' ...' if len(faults) > 8 else ''}"
        )
    model.load_state_dict(tensors, assign=assign)


def save_checkpoint(
    run: Path,
    model: LM,
    tokenizer_dir: Path,
    state: FitState,
    optim: OptimizerSet,
    batches,
    *,
    parent: str | None,
    metrics: dict,
    adapter: AdapterRun | None = None,
    generation: dict | None = None,
) -> Path:
    """Write ``run/checkpoints/step-N``; of an adapter what it learned alone. Raises ValueError if the disk is full; earlier checkpoints stay.

    generation : what `generation_of` read from the parent.
    """
    final = run / "checkpoints" / f"step-{state.step:08d}"
    with new_folder(final, overwrite=True) as part:
        save_tensors(learned(model, adapter) if adapter else model.state_dict(), part / "model")
        about = {"format": FORMAT, "model": to_dict(model.cfg)} | ({"adapter": to_dict(adapter)} if adapter else {})
        (part / "config.json").write_text(json.dumps(about, indent=1), "utf-8")
        shutil.copytree(tokenizer_dir, part / "tokenizer")
        keep_generation(generation, part)
        save_tensors(optim.state_tensors(), part / "train", "optim")
        save_tensors(rng_state(), part / "train", "rng")
        kept = {**asdict(state), "metrics": {}}
        cursor = {"fit": kept, "data": batches.state_dict()}
        (part / "train" / "state.json").write_text(json.dumps(cursor, indent=1), "utf-8")
        manifest = {"format": FORMAT, "step": state.step, "tokens": state.tokens, "parent": parent, "metrics": metrics}
        manifest["sha256"] = hashes(part)
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    return final


def save_model(model: LM, save_tokenizer: Callable[[Path], object], out: Path, parent: Checkpoint, overwrite: bool = False) -> Path:
    """A checkpoint to begin from: weights and tokenizer, no optimizer. Raises ValueError if ``out`` is not empty."""
    with new_folder(out, overwrite) as part:
        save_tensors(model.state_dict(), part / "model")
        (part / "config.json").write_text(json.dumps({"format": FORMAT, "model": to_dict(model.cfg)}, indent=1), "utf-8")
        save_tokenizer(part / "tokenizer")
        keep_generation(generation_of(parent.path), part)
        about = {"step": parent.step, "tokens": parent.manifest["tokens"], "parent": str(parent.path), "metrics": {}}
        (part / "manifest.json").write_text(json.dumps({"format": FORMAT} | about | {"sha256": hashes(part)}, indent=1), "utf-8")
    return out


def generation_of(checkpoint: str | Path | None) -> dict:
    """Stop tokens and sampling defaults that an imported model brought, by transformers' names; none of a model of our own."""
    file = Path(checkpoint) / GENERATION if checkpoint is not None else None
    return read_json(file) if file is not None and file.is_file() else {}


def keep_generation(generation: dict | None, folder: Path) -> None:
    if generation:
        (folder / GENERATION).write_text(json.dumps(generation, indent=1, ensure_ascii=False), "utf-8")


def candidates(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if (p / "manifest.json").is_file())


def latest(run: Path, resuming: bool = True) -> Checkpoint | None:
    """The newest checkpoint whose hashes hold; a damaged one is named and passed over."""
    for path in reversed(candidates(run)):
        try:
            return Checkpoint.open(path, resuming)
        except ValueError as error:
            log_once(f"{error}; trying the one before")
    return None


def best(run: Path, metric: str = "valid_loss") -> Path | None:
    """The checkpoint with the lowest ``metric`` in its manifest."""
    scored = [(read_json(p / "manifest.json")["metrics"].get(metric), p) for p in candidates(run)]
    return min((pair for pair in scored if pair[0] is not None), default=(None, None))[1]


def prune(run: Path, keep: int, protect: Iterable[Path | None] = ()) -> None:
    """Delete all but the newest ``keep`` checkpoints and those in ``protect``, and what a save that was killed has left."""
    for part in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(part, ignore_errors=True)
    for path in candidates(run)[:-keep]:
        if path not in protect:
            shutil.rmtree(path)
