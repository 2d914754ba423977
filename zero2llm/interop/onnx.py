"""The plain forward pass as ONNX: tokens (batch, length) int64 -> logits (batch, length, vocabulary), any batch and length.

    model.onnx   (and model.onnx.data above 2 GB)   config.json   tokenizer.json  tokenizer_config.json  chat_template.jinja

One document a row, no cache, no padding mask: position p of a row is column p. What is exported:

    mixers  gqa (window, sinks, soft-cap, QK-norm, gate), mla          positions  all but ALiBi
    ffns    glu, mlp, moe, rwkv_channel                                norms      rms, layer, dyt

Refused by name: recurrences, linear and sparse attention, whose chunks and choices are cut by the length itself, so that
torch can trace them for one length alone; ALiBi for the same reason; expert choice, which sees the whole batch; batch norm.
A mixture's experts all work on every token (the reference form in ops/route.py): ONNX has no product over groups of rows.
Source: torch.export and torch.onnx (dynamo=True), ONNX opset 20. Why not the older exporter: it traces lengths as constants
without a word, and knows neither grouped attention nor RMS norm.
Why dynamic axes are proved: torch.export refuses a program in which a length had to be known.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import to_dict
from zero2llm.core.files import new_folder
from zero2llm.core.seq import Aux, Seq, State
from zero2llm.interop.checks import Check, logits_of
from zero2llm.interop.hf_config import to_hf_config
from zero2llm.interop.verify import HFTokenizer
from zero2llm.layers.ffns.moe import MoE
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.tokenizers.tokenizer import Tokenizer

MIXERS, FFNS, NORMS = ("gqa", "mla"), ("glu", "mlp", "moe", "rwkv_channel"), ("rms", "layer", "dyt")
OPSET, LARGE = 20, 1_900_000_000  # bytes; a protobuf ends at 2 GB
PACKAGES = "ONNX needs onnx, onnxscript and onnxruntime: pip install 'zero2llm[onnx]'"


class Plain(nn.Module):
    """What is traced: the model on rows that are one document each."""

    def __init__(self, model: LM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        pos = torch.arange(tokens.shape[1], device=tokens.device)[None]  # the same for every row: angles and masks once
        return self.model.logits(self.model(tokens, Seq(pos))[0])


class PlainMoE(nn.Module):
    """y_t = sum_e w_te f_e(x_t), every expert on every token; w_te = 0 where it was not chosen."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]:
        moe, tokens = self.moe, x.flatten(0, 1)
        _, weights, experts = moe.route(F.linear(tokens, moe.router.weight, moe.router.bias))
        of = lambda layer, rows: rows @ layer.weight.mT + (0 if layer.bias is None else layer.bias[:, None])  # (E, N, out)
        each = of(moe.down_proj, moe.act(of(moe.gate_proj, tokens), of(moe.up_proj, tokens)))  # (E, N, D)
        table = (F.one_hot(experts, moe.cfg.n_experts).to(weights.dtype) * weights[..., None]).sum(1)  # (N, E)
        y = (each * table.t()[..., None]).sum(0)
        if moe.shared is not None:
            always = moe.shared(tokens, seq)[0]
            y = y + (always if moe.shared_gate is None else moe.shared_gate(tokens).sigmoid() * always)
        return y.view_as(x), {}


def onnx_faults(cfg: ModelConfig) -> list[str]:
    """Every part that cannot be exported."""
    found = []
    for spec in cfg.blocks.values():
        parts = ("mixer", spec.mixer, MIXERS), ("ffn", spec.ffn, FFNS), ("norm", spec.norm, NORMS)
        found += [f"{name}: {part.kind}" for name, part, kinds in parts if part is not None and part.kind not in kinds]
        if isinstance(spec.mixer, GQAConfig) and spec.mixer.position.kind == "alibi":
            found.append("position: alibi")
    for name, norm in (("final_norm", cfg.final_norm), ("embed_norm", cfg.embed_norm)):
        found += [f"{name}: {norm.kind}"] if norm and norm.kind not in NORMS else []
    found += ["mtp: predictions further ahead are no part of the plain forward pass"] if cfg.mtp else []
    found += ["score_head: it gives scores, not logits; a reward model is written for transformers (hf)"] if cfg.score_head else []
    return list(dict.fromkeys(found))


def export_onnx(model: LM, cfg: ModelConfig, tokenizer_dir: Path, out: Path, overwrite: bool = False) -> Path:
    """Write the folder, whole or not at all, in fp32. Returns ``out``. Takes seconds a layer.

    Raises ValueError before anything is written: a part that cannot be exported, by name; a missing package or tokenizer.
    """
    if faults := onnx_faults(cfg):
        raise ValueError(f"no ONNX export: the exporter cannot express, for every length, {'; '.join(faults)}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (Path(tokenizer_dir) / name).is_file():
            raise ValueError(f"{Path(tokenizer_dir) / name}: no such file; an export needs the tokenizer that the model was trained with")
    _package("onnxscript"), _package("onnx")
    with new_folder(Path(out), overwrite) as part:
        program = _traced(model, cfg)
        large = sum(p.nbytes for p in model.parameters()) > LARGE
        program.save(str(part / "model.onnx"), external_data=large)
        (part / "config.json").write_text(json.dumps(_about(cfg, Path(tokenizer_dir)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, part / name)
    return Path(out)


def _traced(model: LM, cfg: ModelConfig):
    with torch.device("meta"):
        twin = LM(cfg)  # shares the weights; the original keeps its modules
    twin.load_state_dict({name: t.detach().cpu().float() for name, t in model.state_dict().items()}, assign=True)
    for block in twin.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn = PlainMoE(block.ffn)
    shapes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=cfg.max_len)}
    example = torch.arange(2 * min(7, cfg.max_len)).view(2, -1) % cfg.vocab_size
    logger, silent = logging.getLogger("torch.onnx"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of packages that are not needed
    try:  # with gradients on, our layers take their plain form
        with torch.enable_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(silent):
            warnings.simplefilter("ignore")
            program = torch.export.export(Plain(twin.requires_grad_(False)).eval(), (example,), dynamic_shapes=(shapes,))
            asked = {"input_names": ["tokens"], "output_names": ["logits"], "dynamic_shapes": (shapes,)}  # again, for the axes' names
            return torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET, **asked)
    except Exception as error:  # torch.export and the converter have kinds of their own
        raise ValueError(f"no ONNX export: torch cannot trace this model for every length ({str(error).strip().splitlines()[0][:200]})") from error
    finally:
        logger.setLevel(level)


def _about(cfg: ModelConfig, tokenizer_dir: Path) -> dict:
    """As transformers would say it, or in our own words where it has no such model."""
    own = Tokenizer.load(tokenizer_dir)
    try:
        return to_hf_config(cfg, bos=own.bos_id, eos=sorted(own.stop_ids), pad=own.pad_id)
    except ValueError:
        return {"model": to_dict(cfg)}


class OnnxRuntime(HFTokenizer):
    """The folder opened by onnxruntime, its tokenizer by transformers."""

    scale, gives = 1e-4, "logits"

    def __init__(self, folder: Path):
        runtime = _package("onnxruntime")
        super().__init__(folder)
        self.name = f"onnxruntime {runtime.__version__}, the tokenizer by transformers"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = runtime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def run(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(["logits"], {"tokens": rows.numpy()})[0])

    def scores(self, ids: list[int]) -> Tensor:
        return self.run(torch.tensor([ids]))[0]

    def greedy(self, ids: list[int], guess: list[int]) -> list[int]:
        """One pass over the guess says what would have come at every place where it held up to there."""
        best = self.scores(ids + guess[:-1])[len(ids) - 1 :].argmax(-1).tolist()
        right = next((k for k, (a, b) in enumerate(zip(best, guess, strict=True)) if a != b), len(guess) - 1)
        return best[: right + 1]

    def check_shapes(self, model: LM) -> Check:
        """Two lengths and two batch sizes, each row against itself alone."""
        longest, size = min(model.cfg.max_len, 48), model.cfg.vocab_size
        worst, spread = 0.0, 1.0
        for batch, length in ((1, 1), (3, longest), (2, max(1, longest // 3))):
            rows = torch.randint(size, (batch, length), generator=torch.Generator().manual_seed(length))
            ours = torch.stack([logits_of(model, row.tolist()) for row in rows])
            worst, spread = max(worst, float((self.run(rows) - ours).abs().max())), float(ours.std())
        limit = self.scale * spread
        return Check("batches", f"max {worst:.2g} on 1 x 1, 3 x {longest}, 2 x {max(1, longest // 3)}", f"{limit:.2g}", worst <= limit)


def _package(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(f"{PACKAGES} ({name} is missing)") from error
