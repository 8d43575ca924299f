"""The section for those with GPUs: commands for two models, and what `sppctl plan` expects of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markdown_table import table

from sppctl.config.load import load_config
from sppctl.plan.run import execute

GIB = 2**30
SPEED = 0.4 * 312e12  # operations per second that are assumed of an A100
# as on one such GPU, wherever the page is written
ON_GPU = ("model.compute_dtype=bfloat16", "launch.num_processes=1")
MODELS = {"LLaMA-2-7B": "llama2-7b", "Llama-3-8B": "llama3-8b"}  # the configurations with the paper's settings
LIGHT = "train.gradient_checkpointing=true"
# what best-2of4 leaves small for a model of 135 million parameters; as many tokens as in the paper's settings
LARGER = (
    "prune.calibration.seq_len=2048",
    "train.data.split=train",
    "train.data.seq_len=1024",
    "train.batch_size=64",
    "train.max_steps=1173",
    "eval.max_tokens=null",
    "eval.tasks=[zeroshot]",
    LIGHT,
)
SPP = ("train.method=spp", "train.lr=4e-3")
FULL = ("train.lr=5e-5", "launch.num_processes=8", "launch.strategy=fsdp")


@dataclass(frozen=True)
class Way:
    """One way of running a recipe."""

    title: str
    settings: tuple[str, ...]
    best: bool = False  # best-2of4, not the configuration with the paper's settings


WAYS = (
    Way("the paper's", ()),
    Way("the paper's, gradient checkpointing", (LIGHT,)),
    Way("the paper's, gradient checkpointing, packed weights", (LIGHT, "model.weights=packed")),
    Way("best, SPP", (*LARGER, *SPP), best=True),
    Way("best, every kept weight, fsdp", (*LARGER, *FULL), best=True),
)


def text() -> str:
    """The section, with a table of plans."""
    head = ["model", "recipe", "GPUs", "pruning", "training", "GPU", "disk", "steps", "tokens", "hours"]
    return f"""## On GPUs

The paper's settings for LLaMA-2-7B, and the same as a starting point for Llama-3-8B:

```
sppctl plan llama2-7b                                    # figures for other numbers of GPUs, and for fsdp and zero3
sppctl run llama2-7b                                     # Wanda 2:4, SPP on Alpaca, the seven tasks
sppctl run llama2-7b prune.pattern=0.75 run.dir=runs/llama2-7b-wanda-75
sppctl run llama3-8b {LIGHT}   # on a GPU of 40 GB
```

The best recipe of the tables above for as many tokens, with SPP on one GPU, or with every kept weight on eight. Its
learning rates for models of this size are only starting points.

```
LARGER=({" ".join(LARGER[:4])}
        {" ".join(LARGER[4:])})
MODEL={path_of("llama2-7b")}                          # or {path_of("llama3-8b")}
sppctl run best-2of4 --model $MODEL run.dir=runs/best-spp "${{LARGER[@]}}" {" ".join(SPP)}
sppctl run best-2of4 --model $MODEL run.dir=runs/best-full "${{LARGER[@]}}" {FULL[0]} \\
    {" ".join(FULL[1:])}
```

The figures are those of `sppctl plan`; nothing here was measured on a GPU. Memory is in GiB: pruning, and training on
each GPU; "GPU" is the size in GB of the smallest one with room for training. Disk is that of the run directory, in GiB;
`train.keep_checkpoints` decides how many checkpoints are in it. Tokens are those of training, in millions, if every
example were as long as `train.data.seq_len` allows; Alpaca's rows are far shorter.

{table(head, rows(), texts=2)}

The hours are an estimate of training on that many A100, at most: 6 operations for each parameter and token (forward,
gradient of the inputs, gradient of the effective weight), 2 more with gradient checkpointing and 2 more with a teacher,
at 40 % of 312 TFLOP/s. With 8 GPUs under `ddp` the work of the others is divided by 8, too."""


def path_of(name: str) -> str:
    """The model of a shipped configuration."""
    return load_config(name).model.path or ""


def rows() -> Iterator[list[str]]:
    """The rows of the table."""
    for title, name in MODELS.items():
        for way in WAYS:
            yield _row(title, name, way)


def _row(title: str, name: str, way: Way) -> list[str]:
    model = (f"model.path={path_of(name)}", "model.gguf_file=null") if way.best else ()
    config = load_config("best-2of4" if way.best else name, [*ON_GPU, *model, *way.settings])
    plan, gpus, checkpointing = execute(config), config.launch.num_processes, config.train.gradient_checkpointing
    memory = plan.packed if config.model.weights == "packed" else plan.memory
    tokens = plan.steps.tokens_at_most
    assert memory is not None
    assert tokens is not None
    assert isinstance(gpus, int)
    gpu = memory.on(gpus, config.launch.strategy if gpus > 1 else "ddp", checkpointing)
    operations = 6 + 2 * checkpointing + 2 * (plan.memory.teacher > 0)
    hours = operations * plan.model.parameters * tokens / SPEED / gpus / 3600
    sizes = [f"{size / GIB:.1f}" for size in (plan.pruning.peak, gpu.total)]
    smallest = str(min(gpu.fits_gb)) if gpu.fits_gb else "none"
    disk = f"{plan.disk['total'] / GIB:.1f}"
    return [
        *(title, way.title, str(gpus), *sizes, smallest, disk),
        *(f"{plan.steps.steps:,}", f"{tokens / 1e6:.1f}", f"{hours:.1f}"),
    ]
