"""The report: about a machine, and about a model on it."""

import os

from trl_vlm.doctor import machine
from trl_vlm.doctor.findings import Sections


def about_machine(output: str | os.PathLike) -> Sections:
    """What there is to train with.

    Args:
        output: The output folder of a training.
    """
    return {
        "versions": machine.versions(),
        "backends": machine.backends(),
        "devices": machine.devices(),
        "folders": machine.folders(output),
        "nodes": machine.cluster(),
    }


def about_model(path: str, *, dtype: str = "auto", device: str | None = None) -> Sections:
    """What the trainers will make of a model, and whether it behaves as they assume.

    Args:
        path: Folder or hub id, `owner/name[@revision][/folder/in/it]`: a generative model, a reward model, or an
            adapter of either.
        dtype: Precision of the weights; "auto" is that of the checkpoint.
        device: Where to; None: an accelerator, if there is one.

    Raises:
        ValueError: There is no such model, or it reads no images.
    """
    # Only a report about a model pays for transformers and TRL.
    from trl_vlm.doctor import model, policy, scoring
    from trl_vlm.doctor.subject import load_subject
    from trl_vlm.models.place import place_of

    subject = load_subject(place_of(path), dtype=dtype, device=device)
    checks = policy.examine(subject) if subject.template is None else scoring.examine(subject)
    return {path: model.describe(subject), "computed on small images and rows": checks}
