"""`featurecache bodies list` and `bodies show`: which networks there are, and what can be tapped in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.output import Debug, Json, Quiet, command

app = typer.Typer(
    help="List bodies, and show what can be tapped in one.",
    no_args_is_help=True,
    epilog="Example: featurecache bodies list resnet; featurecache bodies show torchvision/resnet18",
)
LIST_EPILOG = "Example: featurecache bodies list densenet"
SHOW_EPILOG = "Example: featurecache bodies show torchvision/densenet121 --image-size 224"


@app.command("list", epilog=LIST_EPILOG)
def list_names(
    word: Annotated[str, typer.Argument(help="Only names that contain it.")] = "",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the bodies that can be named: torchvision's, timm's where installed, registered plug-ins."""
    with command("bodies list", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.bodies.names import list_bodies

        names = list_bodies(word)
        output.outputs = names
        output.figures = {"n": len(names)}
        for name in names or [f"no body has {word!r} in its name"]:
            output.text(name)


@app.command("show", epilog=SHOW_EPILOG)
def show(
    name: Annotated[str, typer.Argument(help="torchvision/NAME, timm/NAME, package.module:factory or run:DIR.")],
    image_size: Annotated[int | None, typer.Option(help="Default: what its weights expect.")] = None,
    channels: Annotated[int | None, typer.Option(help="Input channels.")] = None,
    view: Annotated[str | None, typer.Option(help="Which body of a run.")] = None,
    trust_factory: opt.TrustFactory = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the modules of a body in the order in which they run, with the shape of what each gives."""
    with command("bodies show", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.bodies.registry import RUN_PREFIX, load_body, load_run_body
        from featurecache.bodies.taps import describe

        if name.startswith(RUN_PREFIX):
            body = load_run_body(Path(name.removeprefix(RUN_PREFIX)), view, trust=trust_factory or ())
        else:
            body = load_body(name, "none", seed=0, channels=channels)  # shapes don't depend on weights
        size = (image_size, image_size) if image_size else body.preprocessing.size() or (224, 224)
        found = describe(body, size)
        output.outputs = [info.name for info in found]
        output.figures = {
            "body": name,
            "image_size": list(size),
            "taps": [{**info._asdict(), "shape": list(info.shape) if info.shape else None} for info in found],
        }
        output.text(f"{name} at {size[0]} x {size[1]}, {body.preprocessing.channels} channels")
        width = max(len(info.name) for info in found)
        for info in found:
            shape = " x ".join(map(str, info.shape)) if info.shape else "-"
            marks = ["penultimate"] if info.penultimate else []
            marks += [f"runs {info.calls} times: NAME#0 ... NAME#{info.calls - 1}"] if info.calls > 1 else []
            output.text(f"{info.name:<{width}}  {info.type:<22} {shape:<18} {', '.join(marks)}".rstrip())
        output.next = f"featurecache extract MANIFEST --store STORE --body {name} --tap NAME:POOL"
