"""`deltasync completion`: the script that makes a shell complete commands and options."""

from __future__ import annotations

from typing import Annotated

import typer

from deltasync.cli.options import Call, command, new_app
from deltasync.core.errors import UsageError
from deltasync.core.names import shown

SHELLS = ("bash", "zsh", "fish", "powershell")

app = new_app()


@command(app)
def completion(
    call: Call, shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh, fish or powershell.")]
) -> int:
    """Print a shell's completion script.

    For bash, keep it in ~/.local/share/bash-completion/completions/deltasync
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shown(shell)}; the shells are {', '.join(SHELLS)}")
    from typer._completion_shared import get_completion_script

    script = get_completion_script(prog_name="deltasync", complete_var="_DELTASYNC_COMPLETE", shell=shell)
    call.out.answer({"shell": shell, "script": script})
    if not call.out.is_json:
        print(script)
    return 0
