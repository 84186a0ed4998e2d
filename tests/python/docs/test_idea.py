import idea


def test_the_committed_picture_is_the_scripts() -> None:
    assert idea.PICTURE.read_text() == idea.svg()
