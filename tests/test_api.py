"""The names of the package: what they are, where they come from, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import pruned_llama
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sppctl
from sppctl import SppConfig, evaluate_model
from sppctl.errors import UserError


def test_dir_shows_the_api_and_every_name_is_there() -> None:
    assert dir(sppctl) == sorted([*sppctl.__all__, "__version__"])
    functions = {"prune_model", "prune_linear", "merge_adapter", "evaluate_model", "SppConfig"}
    assert functions <= set(dir(sppctl))
    assert all(getattr(sppctl, name).__doc__ for name in sppctl.__all__)
    rooms = {path.stem for path in Path(sppctl.__file__).parent.iterdir()}
    assert not rooms & set(sppctl.__all__), "a module of the same name would hide it"


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, sppctl; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'peft', 'transformers')])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_types_ship() -> None:
    assert (Path(sppctl.__file__).parent / "py.typed").is_file()


def test_a_model_in_memory_is_measured(llama: Path, text_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama).train()
    sizes = {"seq_len": 32, "max_tokens": 256}
    ((name, value),) = evaluate_model(model, tokenizer, perplexity=[str(text_file)], **sizes).items()
    assert name == f"ppl {text_file} @32, first 256 tokens"
    windows = torch.tensor(tokenizer(text_file.read_text()).input_ids[:256]).view(-1, 32)
    with torch.no_grad():
        losses = [model.eval()(row[None], labels=row[None]).loss for row in windows]
    assert value == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)
    torch.manual_seed(0)
    adapted = get_peft_model(pruned_llama(llama), SppConfig(r=2, init_weights=False))
    ((_, other),) = evaluate_model(adapted, tokenizer, perplexity=[str(text_file)], **sizes).items()
    assert other != pytest.approx(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 10**6}, "eval.seq_len: 1000000 exceeds"),
        ({"perplexity": ["nothing.txt"]}, "nothing.txt"),
        ({"perplexity": ["alpaca"]}, "eval.perplexity: alpaca has only rows for training; use instructions"),
        ({"stride": 65, "seq_len": 64}, "eval.stride: 65 would skip tokens between windows of 64; set at most 64"),
        ({"windows": 2}, "eval.windows: unknown key"),
        ({"divergence": "base"}, "eval.divergence: needs the checkpoints"),
    ],
)
def test_wrong_measures_are_refused(llama: Path, options: dict[str, object], message: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    with pytest.raises(UserError, match=message):
        evaluate_model(model, tokenizer, **options)


def test_tokens_beyond_the_embedding_are_refused(llama: Path, text_file: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    model.resize_token_embeddings(8)
    with pytest.raises(
        UserError, match=f"^eval.perplexity: {text_file}: token id .* is beyond the model's 8 embeddings"
    ):
        evaluate_model(model, tokenizer, perplexity=[str(text_file)], seq_len=32)
