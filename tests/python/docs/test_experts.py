import experts


def test_the_committed_picture_is_the_scripts() -> None:
    assert experts.PICTURE.read_text() == experts.svg()
