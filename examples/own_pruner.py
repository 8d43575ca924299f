"""A pruner and an allocation of one's own, usable in Python and as prune.method=NAME on the command line.

python examples/own_pruner.py --model HuggingFaceTB/SmolLM2-135M
cd examples && sppctl prune --import own_pruner --model MODEL --method rows_wanda --pattern 2:4
"""

# %% A pruner is a function of tensors: weights that share their inputs, the inputs' statistics, a pattern for each
from torch import Tensor

from sppctl import Allocation, Pattern, Pruner, register_allocation, register_pruner
from sppctl.pruners import InputNorms
from sppctl.pruners.masks import mask_by_row


def prune(
    weights: list[Tensor], statistics: InputNorms, patterns: list[Pattern], masks: list[Tensor] | None = None
) -> tuple[list[Tensor], None]:
    """Wanda, with each row's weights (out_features, in_features) relative to the row's largest one."""
    pruned = []
    for index, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
        size = weight.float().abs()
        scores = size / size.amax(dim=1, keepdim=True).clamp_min(1e-12) * statistics.norms()
        mask = mask_by_row(scores, pattern) if masks is None else masks[index]
        pruned.append(weight.masked_fill(~mask, 0))
    return pruned, None  # None: no Hessian was damped


register_pruner("rows_wanda", Pruner(InputNorms, prune))


# %% An allocation measures each dense block, and turns the numbers into ratios with the right mean over all weights
def spread(scores: list[Tensor]) -> float:
    """The largest score of a block's matrices, relative to their mean."""
    return max(score.max().item() for score in scores) / (sum(score.mean().item() for score in scores) / len(scores))


def ratios(values: list[float], sizes: list[int], ratio: float) -> list[float]:
    """Blocks with a large spread lose fewer weights, by at most 5 points."""
    total = sum(value * size for value, size in zip(values, sizes, strict=True))
    mean = total / sum(sizes)
    width = max(abs(value - mean) for value in values) or 1.0
    return [ratio - 0.05 * (value - mean) / width for value in values]


register_allocation("spread", Allocation(spread, ratios))

# %% Use it
if __name__ == "__main__":
    import argparse

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sppctl import evaluate_model, prune_model

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or directory")
    parser.add_argument("--text", default="instructions", help="calibration and test text: c4, wikitext2, a file, ...")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    calibration = {"dataset": options.text, "samples": options.samples, "seq_len": options.seq_len}
    for method, allocation in (("wanda", "uniform"), ("rows_wanda", "uniform"), ("rows_wanda", "spread")):
        model = AutoModelForCausalLM.from_pretrained(options.model)
        settings = {"method": method, "pattern": 0.5, "allocation": allocation, "calibration": calibration}
        record = prune_model(model, tokenizer, **settings)
        sizes = {"seq_len": options.seq_len, "max_tokens": 8 * options.seq_len}
        (value,) = evaluate_model(model, tokenizer, perplexity=[options.text], **sizes).values()
        print(f"{method}, {allocation}: {record.sparsity:.1%} zeros, perplexity {value:.2f}")
