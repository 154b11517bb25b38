"""What is measured, at full size or quickly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """Sizes of all measurements. Prompts and generated tokens are counted in tokens, pools in bytes.

    `pool` is what sequences are packed into; under load servers have `roomy`, in which all `concurrent` sequences run
    together even with the full cache, and a declared prompt beside them. Of `others`, plans of the same size, only a
    decode step is timed.

    `closed` requests are sent by `concurrent` clients, each waiting for its answer; in the open loop requests come at
    random times, on average at a share `rates` of what the closed loop of the plan served. No closed loop lasts longer
    than `limit` seconds. A request is good that meets `ttft` and `tpot`, both in seconds.
    """

    model: str = "demo"
    plan: str = "plans/demo-12.5-16bit.json"
    texts: str = "botocore"
    others: tuple[str, ...] = ("plans/demo-12.5.json",)
    prompt: int = 4096
    prompts: tuple[int, int] = (2048, 6144)
    generated: int = 64
    concurrent: int = 8
    closed: int = 8
    limit: float = 360.0
    open: int = 8
    rates: tuple[float, ...] = (0.8,)
    pool: int = 640 << 20
    roomy: int = 1200 << 20
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)
    batch: int = 8
    steps: int = 64
    entering: int = 6144
    ttft: float = 60.0
    tpot: float = 1.0
    seed: int = 0
    threads: int = 2


def quick(model: str = "demo", plan: str = Asked.plan, texts: str = "botocore") -> Asked:
    """Small enough to see that it works; the figures mean nothing."""
    return Asked(
        model,
        plan,
        texts,
        others=(),
        prompt=256,
        prompts=(128, 384),
        generated=8,
        concurrent=2,
        closed=4,
        open=4,
        rates=(0.5,),
        pool=256 << 20,
        roomy=256 << 20,
        contexts=(1024, 2048),
        batch=2,
        steps=6,
        entering=512,
    )
