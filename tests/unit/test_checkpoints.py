"""A checkpoint is data: nothing in it runs."""

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
def test_a_checkpoint_with_code_in_it_is_refused_with_a_sentence_and_the_code_does_not_run(tmp_path, name):
    """Whatever it calls itself."""
    import torch

    proof = tmp_path / "it ran"
    torch.save({"state_dict": {"logit_scale": torch.ones(())}, "more": Payload(str(proof))}, tmp_path / name)
    with pytest.raises(WeightsUnavailable, match=r"the weights '.*' of ViT-S-32-alt cannot be loaded: ") as caught:
        load_oracle(Weights(MODEL, str(tmp_path / name)))
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice is to switch the guard off
    assert "\n" not in str(caught.value)
    torch.load(BytesIO((tmp_path / name).read_bytes()), weights_only=False)
    assert proof.exists()  # so it would have run


def test_nothing_here_unpickles_or_trusts_remote_code():
    ways = re.compile(r"trust_remote_code|weights_only=False|allow_pickle=True|\bpickle\.load|torch\.load\(")
    sources = [path for folder in ("models", "backends", "client", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    assert [str(path) for path in sources if ways.search(path.read_text())] == []
