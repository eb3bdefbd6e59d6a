import logging

from dynmix.heard import warnings_heard


def test_warnings_of_dynmix_are_heard_once_each_and_logged_as_ever(caplog):
    heard: list[str] = []
    with warnings_heard(heard):
        for _ in range(2):
            logging.getLogger("dynmix.influence.group").warning("%d of %d", 1, 2)
        logging.getLogger("dynmix").error("worse")
        logging.getLogger("dynmix").info("nothing")
        logging.getLogger("other").warning("of no concern")
    logging.getLogger("dynmix").warning("too late")
    assert heard == ["1 of 2", "worse"]
    assert [record.message for record in caplog.records if record.name.startswith("dynmix")].count("1 of 2") == 2


def test_where_nobody_configured_logging_warnings_still_reach_stderr_once(monkeypatch, capsys):
    for log in (logging.getLogger(), logging.getLogger("dynmix")):
        monkeypatch.setattr(log, "handlers", [])
    with warnings_heard([]), warnings_heard(heard := []):
        logging.getLogger("dynmix.mixture").warning("inside")
        logging.getLogger("dynmix").info("nothing")
    logging.getLogger("dynmix").warning("outside")
    assert capsys.readouterr().err == "inside\noutside\n"
    assert heard == ["inside"]
