"""Downloads the model, data sets and tasks of a configuration into the Hugging Face cache by opening them.

prefetch.sh runs this twice, with and without network access: what opens offline here also opens on a compute node.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import constants, hf_hub_download

from sppctl import console
from sppctl.config.load import load_config
from sppctl.config.settings import names_of
from sppctl.data import texts
from sppctl.errors import StageError, UserError
from sppctl.evaluate import harness, tasks
from sppctl.run import pipeline
from sppctl.run.directory import Run


def prefetch(path: str) -> None:
    """Opens everything that ``sppctl run`` would read with the configuration ``path``.

    Raises:
        UserError: the model, a data set or the data of a task could not be loaded.
    """
    # login nodes have no GPUs, and the checks of the stages look for the device first
    config = load_config(path, ["model.device=cpu", "launch.num_processes=1", "launch.num_machines=1"])
    offline = constants.HF_HUB_OFFLINE
    console.note(f"{'opening offline' if offline else 'downloading'}: {config.model.path}, its texts and training data")
    trained_on = names_of(config.train.data.dataset)
    splits = {
        "train": "c4" in (config.prune.calibration.dataset, *trained_on),
        "validation": "c4" in config.eval.perplexity,
    }
    for split in [split for split, read in splits.items() if read and not offline]:
        # download the whole shard: streaming leaves nothing in the cache
        hf_hub_download("allenai/c4", texts.C4_FIRST_SHARD[split], repo_type="dataset")
    calibration = config.prune.calibration
    if not offline and texts.is_hub_id(calibration.dataset) and not Path(calibration.dataset).is_file():
        texts.load_hub(calibration.dataset, calibration.split)
    pipeline.preflight(Run(config, force=True), ("prune", "train", "eval"))
    wanted = [measure.task for measure in tasks.configured(config)]
    if wanted:
        console.note(f"{'opening offline' if offline else 'downloading'}: {len(wanted)} tasks")
        harness.load_tasks(wanted, config.eval.include_path)


if __name__ == "__main__":
    try:
        prefetch(sys.argv[1])
    except (UserError, StageError) as error:
        for line in str(error).splitlines():
            console.note(f"error: {line}")
        sys.exit(error.exit_code)
