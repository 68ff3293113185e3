"""`fanlight audit IMAGE...`: where the bytes of container images are. Its options are in fanlight/audit/program.py."""

import typer

# The options are read by the audit itself, which also runs without Fanlight.
AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def audit(context: typer.Context) -> None:
    """Show where the bytes of container images are, and what could go."""
    from fanlight.audit.program import main

    raise typer.Exit(main(context.args, name="fanlight audit"))
