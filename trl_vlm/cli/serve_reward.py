"""`trl-vlm serve-reward`: a reward model behind an address, for trainings on other cards or machines."""

import argparse
import ipaddress
from dataclasses import asdict
from typing import TYPE_CHECKING

from trl_vlm.cli.options import CommandFailed, positive

if TYPE_CHECKING:
    from trl_vlm.rewards.reward_model import RewardModelReward
    from trl_vlm.rewards.server import Limits

THIS_MACHINE = "127.0.0.1"


def add(command: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-vlm serve-reward`."""
    command.add_argument("model", help="folder or hub id of a reward model: all weights, or a PEFT adapter")
    command.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    command.add_argument(
        "--host", default=THIS_MACHINE, help="address to listen at; 0.0.0.0 for all (default: %(default)s)"
    )
    command.add_argument("--port", type=int, default=8100, help="port to listen at (default: %(default)s)")
    command.add_argument(
        "--key-variable",
        metavar="VARIABLE",
        help="environment variable with the key that clients must send as a bearer token",
    )
    command.add_argument(
        "--without-key", action="store_true", help="let other machines ask without a key, where the network is trusted"
    )
    command.add_argument("--batch-size", type=positive, default=16, help="rows at once (default: %(default)s)")
    command.add_argument("--max-length", type=positive, help="longest row in tokens; a longer one is refused")
    command.add_argument("--dtype", help="precision of the weights (default: bfloat16 on CUDA, else float32)")
    command.add_argument("--load-in-4bit", action="store_true", help="load the weights in 4 bits (bitsandbytes)")
    command.add_argument("--device", help="where to score, such as cuda:1 (default: the first device)")
    limits = command.add_argument_group("limits of a request")
    limits.add_argument("--max-rows", type=positive, default=256, help="rows (default: %(default)s)")
    limits.add_argument(
        "--max-megabytes", type=positive, default=128, help="size, images in base64 included (default: %(default)s)"
    )
    limits.add_argument(
        "--max-megapixels", type=positive, default=512, help="pixels of its images, in millions (default: %(default)s)"
    )
    limits.add_argument(
        "--max-waiting",
        type=positive,
        default=64,
        help="requests at once; a further one must come again (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    from trl_vlm.data.io.http import key_in

    check_host(options.host, has_key=options.key_variable is not None or options.without_key)
    key = key_in(options.key_variable) if options.key_variable else None
    try:
        import uvicorn

        from trl_vlm.rewards.server import make_app
    except ModuleNotFoundError as error:
        raise CommandFailed(
            f"`trl-vlm serve-reward` needs the package {error.name!r}. Install it with `pip install 'trl-vlm[serve]'`."
        ) from error
    reward = reward_of(options)
    about = {"model": options.model, "revision": _revision(options), "template": asdict(reward.template)}
    app = make_app(reward, about, key=key, limits=limits_of(options))
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,  # a line for every request
        server_header=False,
        lifespan="off",
        ws="none",
    )
    return 0


def check_host(host: str, *, has_key: bool) -> None:
    """Refuses to serve other machines without a key.

    Raises:
        ValueError: The message says what to set.
    """
    if not has_key and not is_this_machine(host):
        raise ValueError(
            f"`--host {host}` lets other machines ask, and there is no key. Put one into an environment variable and "
            "name it (`--key-variable REWARD_KEY`), or allow it with `--without-key`."
        )


def is_this_machine(host: str) -> bool:
    """Whether nobody but this machine reaches what listens at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def reward_of(options: argparse.Namespace) -> "RewardModelReward":
    """The reward model, loaded.

    Raises:
        ValueError: There is no such model, or it has no head.
    """
    import torch

    from trl_vlm.models.place import place_of
    from trl_vlm.rewards.reward_model import RewardModelReward

    place = place_of(options.model)
    settings = {**place.load_options, "dtype": options.dtype}
    if options.dtype is None:
        settings["dtype"] = "bfloat16" if torch.cuda.is_available() else "float32"
    if options.revision:
        settings["revision"] = options.revision
    if options.load_in_4bit:
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=settings["dtype"]
        )
    reward = RewardModelReward(
        place.path, batch_size=options.batch_size, max_length=options.max_length, device=options.device, **settings
    )
    reward.model  # noqa: B018  an adapter is loaded when it is first asked for
    return reward


def limits_of(options: argparse.Namespace) -> "Limits":
    """What a request may hold."""
    from trl_vlm.rewards.server import Limits

    return Limits(
        body_bytes=options.max_megabytes * 1_000_000,
        rows=options.max_rows,
        pixels=options.max_megapixels * 1_000_000,
        waiting=options.max_waiting,
    )


def _revision(options: argparse.Namespace) -> str | None:
    """The commit of a model of the hub, or what was asked for; None for a folder."""
    from transformers import AutoConfig

    from trl_vlm.models.place import place_of

    place = place_of(options.model)
    revision = options.revision or place.revision
    try:
        config = AutoConfig.from_pretrained(place.path, revision=revision, subfolder=place.subfolder or "")
    except OSError:  # an adapter without a configuration
        return revision
    return getattr(config, "_commit_hash", None) or revision
