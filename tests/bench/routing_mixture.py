"""The routing suite: how well a mixture finds the right one of 2, 4, 8 and all experts, and how it takes images of none.

Protocols: one answer among the classes of all tasks pooled, at 1 and 3 (KnOTS, Stoica et al. 2024, joint evaluation), beside
the accuracy relative to the own expert with the task told (MASS, Crisostomi et al. 2025).
"""

import time

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from common import models
from common.cli.flags import MixtureConfig
from common.cli.parser import parse
from common.data.tensors import ImageSet
from common.mixture import Batches
from common.training.evaluate import EVALUATION_BATCH
from ContextGatedMOE import ContextGatedMOE
from tests.bench.measure import Settings
from tests.bench.routing import Member, members

COUNTS = (2, 4, 8)


def routing(settings: Settings) -> pd.DataFrame:
    """joint accuracy at 1 and 3 of mixtures of 2, 4, 8 and all experts of the routing suite, and with one task unknown."""
    rows = []
    for seed in settings.seeds:
        every = members(settings, seed)
        for count in dict.fromkeys([count for count in COUNTS if count < len(every)] + [len(every)]):
            rows.append({"seed": seed, **evaluated(every[:count], settings, seed)})
        largest = every[: max(COUNTS)]
        for unknown in largest[:1] if settings.quick else largest:
            known = [member for member in largest if member is not unknown]
            rows.append({"seed": seed, **evaluated(known, settings, seed, unknown)})
    return pd.DataFrame(rows)


def evaluated(known: list[Member], settings: Settings, seed: int, unknown: Member | None = None) -> dict[str, object]:
    """Scores of a mixture of these tasks' experts, means over tasks; with a task left out, how its images are told apart, else
    also those of top 1, whose few numbers are fitted for itself.

    auroc: of the familiarity, auroc_largest: of the largest probability; fpr95: how many of the unknown images pass where 95 %
    of the known ones do, by the familiarity.
    """
    config = parse(MixtureConfig, ["--demo", "--seed", str(seed), "--device", str(settings.device)])
    model = ContextGatedMOE.from_adapters(
        models.load_backbone(config.model, ["any"], seed), {member.name: member.adapter for member in known},
        {member.name: member.classes for member in known}).to(settings.device).eval()
    started = time.perf_counter()
    validation = {member.name: Batches(member.validation, EVALUATION_BATCH) for member in known}
    model.fit_gates({member.name: Batches(member.train, EVALUATION_BATCH) for member in known}, validation)
    seconds = time.perf_counter() - started
    owner = np.array([name for name, _ in model.labels])
    scores, familiar, largest, right = [], [], [], []
    for member in known:
        logits, familiarity = said(model, member.test, settings)
        familiar.append(familiarity)
        largest.append(logits.max(1))
        columns = np.array(model.columns[member.name])
        labels = member.test.labels.cpu().numpy()
        right.append(columns[labels])
        order = np.argsort(-logits, axis=1)
        scores.append({
            "joint_1": np.mean(order[:, 0] == right[-1]),
            "joint_3": np.mean((order[:, :3] == right[-1][:, None]).any(1)),
            "told": np.mean(logits[:, columns].argmax(1) == labels), "right_task": np.mean(owner[order[:, 0]] == member.name),
            "own": member.accuracy,
        })
    row = {"experts": len(known), "left_out": "" if unknown is None else unknown.name, "classes": len(model.labels),
           **pd.DataFrame(scores).mean().to_dict()}
    row["relative"] = row["joint_1"] / row["own"]
    if unknown is not None:
        logits, familiarity = said(model, unknown.test, settings)
        truth = np.repeat([1, 0], [sum(map(len, familiar)), len(familiarity)])
        score = np.concatenate([*familiar, familiarity])
        false, true, _ = roc_curve(truth, score)
        row |= {"auroc": roc_auc_score(truth, score), "fpr95": false[np.argmax(true >= 0.95)],
                "auroc_largest": roc_auc_score(truth, np.concatenate([*largest, logits.max(1)]))}
    else:
        model.top_k = 1
        model.fit_gates({}, validation)
        row["top_1"] = np.mean([np.mean(said(model, member.test, settings)[0].argmax(1) == own)
                                for member, own in zip(known, right, strict=True)])
    return row | {"seconds": seconds}


def said(model: ContextGatedMOE, data: ImageSet, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Joint log-probabilities (N, C) and familiarity (N,) of images."""
    answers = [model.predict(pixel_values=data.batch(rows).to(settings.device))
               for rows in torch.arange(len(data)).split(EVALUATION_BATCH)]
    return (torch.cat([answer.logits for answer in answers]).cpu().numpy(),
            torch.cat([answer.familiarity for answer in answers]).cpu().numpy())
