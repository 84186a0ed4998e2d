import command_line


def test_the_committed_page_is_the_commands() -> None:
    assert command_line.PAGE.read_text() == command_line.page(), "run python docs/command_line.py"


def test_every_command_has_a_section() -> None:
    text = command_line.page()
    assert all(f"## csulora {name}" in text for name in ("extract", "correct", "guard", "vllm-serve", "doctor"))
