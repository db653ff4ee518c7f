"""Loading a checkpoint never runs code from it."""

import os
import re
from io import BytesIO

import pytest

from clip_tools.oracle import Weights, WeightsUnavailable, load_oracle
from clip_tools.paths import ROOT

MODEL = "ViT-S-32-alt"  # a small one


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.bin", "checkpoint.safetensors"])
def test_a_checkpoint_that_contains_code_is_refused_and_the_code_does_not_run(tmp_path, name):
    """Whatever its suffix says."""
    import torch

    proof = tmp_path / "it ran"
    torch.save({"state_dict": {"logit_scale": torch.ones(())}, "more": Payload(str(proof))}, tmp_path / name)
    with pytest.raises(WeightsUnavailable, match=r"the weights '.*' of ViT-S-32-alt cannot be loaded: ") as caught:
        load_oracle(Weights(MODEL, str(tmp_path / name)))
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)  # torch's own message advises to turn the protection off
    assert "\n" not in str(caught.value)
    torch.load(BytesIO((tmp_path / name).read_bytes()), weights_only=False)
    assert proof.exists()  # without the protection the code runs


def test_no_module_unpickles_or_trusts_remote_code():
    ways = re.compile(r"trust_remote_code|weights_only=False|allow_pickle=True|\bpickle\.load|torch\.load\(")
    sources = [path for folder in ("models", "backends", "client", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    assert [str(path) for path in sources if ways.search(path.read_text())] == []
