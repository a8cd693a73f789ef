"""Command lines, called in this process."""

import pytest

import hf_ae_cli


def runs(*argv: object, main=hf_ae_cli.main):
    """The command ends well."""
    try:
        main([str(a) for a in argv])
    except SystemExit as stop:
        assert not stop.code


def fails(capsys, argv, *words: str, main=hf_ae_cli.main):
    """The command ends with exit code 2 and one line that says all these words."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors[0]
