"""The command line, ``ucp``: ``commands`` declares it; each command's work is in a module that is imported when it is called.

Errors that the user can mend are printed as ``error: …`` on stderr, without a traceback; the exit status is then 2.
"""

from ucp_deepspeed.cli.commands import main

__all__ = ["main"]
