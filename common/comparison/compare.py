"""`CGM_Lora.py --compare`: the comparison of one finished mixture, made once and then shown."""

from typing import Any

import pandas as pd

from common import models
from common.cli.flags import MixtureConfig
from common.comparison.method_comparison import MethodComparison
from common.comparison.score import EVERY_TASK
from common.data.tensors import TaskData
from common.errors import UserError
from common.files import remove
from common.results import plotting
from common.results.folder import Results
from common.results.summary import as_text
from common.training import distributed
from ContextGatedMOE import ContextGatedMOE

NAME = "CGM_Lora_Comparison"
# Title of a column on the terminal -> column and format.
PRINTED = {
    "method": ("method", ""), "accuracy": ("accuracy", ".1%"), "right task": ("right_task", ".1%"),
    "within it": ("accuracy_given_right_task", ".1%"), "told the task": ("accuracy_told_task", ".1%"),
    "mean of seeds": ("accuracy_mean", ".1%"), "spread": ("accuracy_spread", ".1%"), "p (Holm)": ("mcnemar_p_holm", ".3f"),
    "trained": ("trainable_parameters", ",.0f"), "parameters": ("total_parameters", ",.0f"),
    "images/s": ("images_per_second", ",.0f"),
}


def compare(config: MixtureConfig, tasks: list[TaskData], mixture: ContextGatedMOE, results: Results) -> None:
    """Compare a finished mixture with every other way to use its adapters, all on one shuffled test set, the task not told.

    Writes CGM_Lora_Comparison.csv (see `Comparison.table`) and .png, and prints the table. All that is trained is trained
    `config.seeds` times, with the seeds from `config.seed` on; the experts are the same every time. A comparison of this
    mixture with as many seeds that is there already is printed only. Raises UserError if there is one task only, a base
    model is missing, or the table that is there cannot be read.
    """
    if len(tasks) < 2:
        raise UserError("--compare needs two tasks or more; add one with Data_Preparation.py --task NAME=SOURCE")
    folder = results.folder / "Models" / models.mixture_name([data.task.key for data in tasks])
    made_of = {"of_mixture": f"sha256:{str(models.fingerprint(folder))[:12]}", "of_seeds": config.seeds}
    if distributed.any_of(bool(_show_finished(results, made_of))):
        return
    table = MethodComparison(config, tasks, mixture, results).run().assign(**made_of)
    results.write_table(f"{NAME}.csv", table)
    _draw(results, table)
    _print(results, table)


def forget(results: Results) -> None:
    """Delete the comparison of another mixture than the one that is there now."""
    if distributed.rank() == 0:
        for ending in ("csv", "png"):
            remove(results.folder / f"{NAME}.{ending}")


@distributed.on_main
def _show_finished(results: Results, made_of: dict[str, Any]) -> bool:
    """Show the comparison that is there if it was made of this, and say whether it was."""
    path = results.folder / f"{NAME}.csv"
    if not path.exists():
        return False
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        if any((table[key] != value).any() for key, value in made_of.items()):
            return False
        _print(results, table)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as the table of a comparison ({reason}); delete it, and the same command makes "
                        "it anew") from error
    if not (results.folder / f"{NAME}.png").exists():
        _draw(results, table)
    print("The comparison is finished already; --overwrite makes it anew, with its mixture")
    return True


def _draw(results: Results, table: pd.DataFrame) -> None:
    title = results.title("One model for all tasks, the task not told")
    plotting.comparison(results.folder / f"{NAME}.png", table, title)


@distributed.on_main
def _print(results: Results, table: pd.DataFrame) -> None:
    """Print the rows of all tasks together."""
    print(as_text(table[table["task"] == EVERY_TASK], PRINTED))
    print(f"The comparison is in {results.folder / NAME}.csv and .png")
