"""A table for a paper: methods by patterns, one perplexity each, as LaTeX (booktabs) and CSV.

    python examples/paper_table.py --model HuggingFaceTB/SmolLM2-135M --text wikitext2

`sppctl sweep` and `sppctl report --latex` do the same with training, benchmark tasks and seeds.
"""

# %% The grid
import argparse

import pandas as pd
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl import evaluate_model, prune_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or directory")
parser.add_argument("--text", default="wikitext2", help="c4, wikitext2, a file, ...")
parser.add_argument("--calibration", default="c4", help="text for calibration")
parser.add_argument("--samples", type=int, default=128, help="calibration windows")
parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a window")
parser.add_argument("--out", default="table", help="name of table.tex and table.csv, without the ending")
options = parser.parse_args()
METHODS, PATTERNS = ("magnitude", "wanda", "sparsegpt"), ("0.5", "4:8", "2:4")
calibration = {"dataset": options.calibration, "samples": options.samples, "seq_len": options.seq_len}
tokenizer = AutoTokenizer.from_pretrained(options.model)


def perplexity(method: str | None, pattern: str) -> float:
    """Of the model, pruned by a method; None: dense."""
    model = AutoModelForCausalLM.from_pretrained(options.model)
    if method is not None:
        prune_model(model, tokenizer, method=method, pattern=pattern, calibration=calibration)
    (value,) = evaluate_model(model, tokenizer, perplexity=[options.text], seq_len=options.seq_len).values()
    return float("nan") if value is None else value


# %% One model at a time
dense = perplexity(None, "")
rows = {method: [perplexity(method, pattern) for pattern in PATTERNS] for method in METHODS}

# %% The table
table = pd.DataFrame(rows, index=list(PATTERNS)).T.rename_axis("method")
table.to_csv(f"{options.out}.csv")
lines = [" & ".join([method, *(f"{value:.2f}" for value in values)]) + r" \\" for method, values in rows.items()]
head = " & ".join(["", *PATTERNS]) + r" \\"
latex = "\n".join([rf"\begin{{tabular}}{{l{'r' * len(PATTERNS)}}}", r"\toprule", head, r"\midrule"])
latex += "\n" + "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% dense: {dense:.2f}"]) + "\n"
with open(f"{options.out}.tex", "w", encoding="utf-8") as file:
    file.write(latex)
print(table.round(2))
