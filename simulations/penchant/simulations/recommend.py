"""What a released model recommends to one user of the run's data, computed as on the user's own device."""

from __future__ import annotations

from typing import Any

import numpy as np

from penchant.common import metrics
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.simulations.runs import RunFolder
from penchant.simulations.simulate import learner_of, load_data


def recommend(folder: RunFolder, row: str, user: str, k: int) -> dict[str, Any]:
    """The user's latest items and k new ones, with titles.

    Raises:
        InvalidConfig: no such model or user in the run.
    """
    state, manifest = folder.read_model(row)
    data = load_data(folder.read_config())
    people = {name: place for place, name in enumerate(data.interactions.users)}
    if user not in people:
        raise InvalidConfig(f"no user {user!r} in {data.name}{did_you_mean(user, people)}")
    history = data.interactions.select([people[user]])
    learner = learner_of(manifest, data.catalogue)
    scores = learner.scores(state, history)
    best = metrics.top_k(scores, history, k)[0]

    def shown(item: int) -> dict[str, Any]:
        c = data.catalogue
        return {"item": c.ids[item], "title": c.titles[item], "topics": list(c.topics[item])}

    return {
        "user": user,
        "row": row,
        "recent": [shown(int(i)) for i in history.items[-5:][::-1]],
        "items": [{**shown(int(i)), "score": float(scores[0, i])} for i in best[best >= 0]],
        "privacy": manifest["privacy"],
        "privacy_note": manifest["privacy_note"],
        "n_history": int(np.asarray(history.lengths)[0]),
    }
