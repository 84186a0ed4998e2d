"""What a command's exit code says; 2, for usage errors, is typer's."""

REFUSED = 3  # an adapter or a file was refused by a rule or the policy
BAD_INPUT = 4  # also an installation that does not work
NO_VERDICT = 5  # no tuned policy beats plain scaling, and one was required
INTERRUPTED = 130  # as shells say it of SIGINT
