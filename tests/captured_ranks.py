"""One rank of small trainings, eager and captured, as torchrun starts it: FOLDER, where text.txt is, and cpu or gpu.

Each rank writes the losses of its own windows, and the weights that it ends with, to FOLDER/rank-NUMBER.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_capture import stand_in, train

from charlm.capture import CapturedCharLM
from charlm.module import CharLM

if __name__ == "__main__":
    folder, device = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        for order in ("shuffled", "streams"):
            for build in (CharLM, CapturedCharLM):
                record, trainer, model = train(folder, build, device, order=order, devices=2, batch_size=8)
                weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
                found[f"{build.__name__} {order}"] = {"losses": record.losses, "weights": weights.tolist()}
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))
