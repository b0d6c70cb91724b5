"""`featurecache bodies list` and `bodies show`: which networks there are, and what can be tapped in them."""

from __future__ import annotations

from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.flags import Command, Group
from featurecache.cli.output import Debug, Json, Quiet, command

app = typer.Typer(
    cls=Group,
    help="List bodies, and show what can be tapped in one.",
    no_args_is_help=True,
    epilog="Example: featurecache bodies list resnet; featurecache bodies show torchvision/resnet18",
)
LIST_EPILOG = "Example: featurecache bodies list densenet"
SHOW_EPILOG = "Example: featurecache bodies show torchvision/densenet121 --image-size 224"


@app.command("list", cls=Command, epilog=LIST_EPILOG)
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


@app.command("show", cls=Command, epilog=SHOW_EPILOG)
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
        from featurecache.bodies.shown import show_body

        found = show_body(name, image_size=image_size, channels=channels, view=view, trust_factory=trust_factory or ())
        output.outputs = [info.name for info in found.modules]
        output.figures = found.to_json()
        output.lines += found.lines()
        output.next = f"featurecache extract MANIFEST --store STORE --body {name} --tap NAME:POOL"
