"""A run's machines: the next offer where one fails, strays, crashes, several at once; and reap."""

from __future__ import annotations

import threading

import pytest

from sparse_coding.errors import UserError
from tests.vast_utils.desks import CONTAINER, NEED, content, dispatcher, furnish, make_world
from tests.vast_utils.fake_market import Fate, Host, Market, VirtualClock
from tests.vast_utils.fake_vast import KEY, Fault, in_process
from vast_utils import reap as reaping
from vast_utils.budget import OverBudget
from vast_utils.destroy import Unconfirmed
from vast_utils.fleet import NoMachine
from vast_utils.ledger import Caps, Ledger
from vast_utils.offers import Price
from vast_utils.rental import Lost, NotRented, Rental


@pytest.fixture
def world(monkeypatch, tmp_path):
    return make_world(monkeypatch, tmp_path)


def records(world, run: str = "toy"):
    return Ledger(run, world.folder).records()


def test_offers_that_fail_are_passed_over_and_banned(world):
    hosts = world.market.hosts
    hosts[0].gone = True
    hosts[1].fate = Fate(runs_after=None)
    hosts[2].fate = Fate(exits_after=10)
    hosts[3].machine_id = hosts[2].machine_id  # another offer of the same machine
    with dispatcher(world) as fleet:
        rental, instance = fleet.hire(NEED, furnish, 2.0, content, "ssh-ed25519 AAAA")
        assert rental.record.offer == hosts[4].id
        assert list(world.market.leases) == [instance.id]
        assert world.market.leases[instance.id].keys == ["ssh-ed25519 AAAA"]
        states = {record.offer: record.state for record in records(world)}
        assert states == {100: "refused", 101: "destroyed", 102: "destroyed", 104: "ready"}
        assert fleet.desk.budget.spent() >= world.market.spent


def test_a_machine_that_fails_its_check_is_destroyed(world):
    def picky(rental: Rental, instance) -> None:
        if rental.record.offer < 102:
            raise Lost("nvidia-smi does not answer")

    with dispatcher(world) as fleet:
        rental, _ = fleet.hire(NEED, furnish, 2.0, picky)
        assert rental.record.offer == 102
        bans = {record.offer: record.ban for record in records(world)}
        assert bans == {100: "nvidia-smi does not answer", 101: "nvidia-smi does not answer", 102: ""}
        assert len(world.market.leases) == 1


def test_when_nothing_works_it_says_what_was_tried(world):
    for host in world.market.hosts:
        host.gone = True
    with dispatcher(world) as fleet, pytest.raises(NoMachine, match=r"offer 100.*no_such_ask.*offer 105"):
        fleet.hire(NEED, furnish, 2.0, content)
    assert world.count("search") == 3
    assert world.count("create") == 6


def test_a_search_that_fails_is_repeated(world):
    world.fake.fail_next("search", *[Fault(500)] * 2)
    with dispatcher(world) as fleet:
        assert fleet.hire(NEED, furnish, 2.0, content)[0].record.state == "ready"


def test_the_cap_per_hour_holds_where_the_need_names_none(world):
    world.market.hosts = [Host(1, 1, dph_base=0.9)]
    with dispatcher(world) as fleet, pytest.raises(NoMachine):
        fleet.hire(type(NEED)(), furnish, 2.0, content)
    assert world.count("create") == 0


def test_the_ssh_key_is_attached_through_bad_answers(world):
    world.fake.fail_next("attach", *[Fault(502)] * 4, Fault(0, after=True))
    with dispatcher(world) as fleet:
        _, instance = fleet.hire(NEED, furnish, 2.0, content, "ssh-ed25519 AAAA")
    assert world.market.leases[instance.id].keys == ["ssh-ed25519 AAAA"]


def test_strays_of_the_run_are_destroyed_and_nothing_else_is(world):
    """Nor is a machine that a colleague rented with the same account for a run that has the same name."""
    with dispatcher(world) as fleet:
        world.fake.fail_next("create", Fault(429, after=True))
        rental, instance = fleet.hire(NEED, furnish, 2.0, content)
        (refused,) = [record for record in records(world) if record.state == "refused"]
        assert len(world.market.leases) == 2  # the request that was refused had rented
        others = [
            world.market.create(world.market.hosts[5], {"label": label, "disk": 1})
            for label in ("", "my notebook", "sparse-coding.other.01", "sparse-coding.toy-2.01", "sparse-coding.toy.01")
        ]
        twin = world.market.create(world.market.hosts[5], {"label": rental.record.label, "disk": 1})
        assert list(fleet.look()) == [instance.id]
        assert twin.id not in world.market.leases
        assert refused.label not in {lease.label for lease in world.market.leases.values()}
        assert all(lease.id in world.market.leases for lease in others)
        fleet.close()
        assert sorted(world.market.leases) == [lease.id for lease in others]
        assert rental.record.state == "ready"  # what the ledger knows is newer than what the caller holds
        assert {record.state for record in records(world)} == {"refused", "destroyed"}


def test_a_machine_that_appears_after_a_doubt_is_destroyed_and_paid_for(world):
    world.market.hosts[0].fate.hidden_for = 200
    world.fake.fail_next("create", Fault(504, after=True))
    with dispatcher(world) as fleet:
        fleet.hire(NEED, furnish, 2.0, content)
        assert [record.state for record in records(world)] == ["doubtful", "ready"]  # oldest first
        world.clock.sleep(200)
        assert len(fleet.look()) == 1
        assert [record.state for record in records(world)] == ["destroyed", "ready"]
        fleet.close()
        assert fleet.desk.budget.spent() >= world.market.spent
    assert not world.market.leases


def test_after_a_crash_ready_machines_go_on_and_all_others_end(world):
    with dispatcher(world) as fleet:
        ready, _ = fleet.hire(NEED, furnish, 2.0, content)
        offers = fleet.desk.account.search({}, 40.0, False)
        started, unanswered, ending = [
            Rental.intend(fleet.desk, offer, Price(0.45, 0.0, None), 40.0, 0.6) for offer in offers[1:4]
        ]
        started.create(CONTAINER)
        fleet.desk.account.create(offers[2].id, CONTAINER, 40.0, unanswered.record.label, None)
        ending.create(CONTAINER)
        ending._move("destroying")
    assert len(world.market.leases) == 4
    with dispatcher(world) as fleet:
        assert [rental.record.label for rental in fleet.recover()] == [ready.record.label]
    assert list(world.market.leases) == [ready.record.instance]
    assert sorted(record.state for record in records(world)) == ["destroyed", "destroyed", "destroyed", "ready"]


def test_a_restart_does_not_refill_the_purse(world):
    caps = Caps(0.6, 1.0, 6.0)
    with dispatcher(world, caps) as fleet:
        rental, _ = fleet.hire(NEED, furnish, 6.0, content)
        world.clock.sleep(7000)
        rental.destroy()
    with dispatcher(world, caps) as fleet:
        assert fleet.desk.budget.free() < 0.25
        with pytest.raises(OverBudget):
            fleet.hire(NEED, furnish, 6.0, content)


def test_several_machines_hired_at_once_share_the_cap(monkeypatch, tmp_path):
    hosts = [Host(100 + i, 10 + i) for i in range(12)]
    world = make_world(monkeypatch, tmp_path, Market(VirtualClock(), hosts))
    got, failed = [], []
    with dispatcher(world, Caps(0.6, 2.0, 6.0)) as fleet:

        def hire() -> None:
            try:
                got.append(fleet.hire(NEED, furnish, 1.4, content)[0])
            except (OverBudget, NoMachine) as error:
                failed.append(error)

        threads = [threading.Thread(target=hire) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got
        assert failed
        assert sum(rental.record.reserved for rental in got) <= 2.0
        assert fleet.desk.budget.free() >= 0
        fleet.close()
    assert not world.market.leases


def test_close_goes_on_where_one_machine_resists(world):
    world.market.hosts[0].fate.destroy_refusals = float("inf")
    with dispatcher(world) as fleet:
        stuck, _ = fleet.hire(NEED, furnish, 1.0, content)
        fleet.hire(NEED, furnish, 1.0, content)
        with pytest.raises(Unconfirmed, match=str(stuck.record.instance)):
            fleet.close()
    assert list(world.market.leases) == [stuck.record.instance]


def test_what_is_kept_is_not_ended_and_all_else_is(world):
    with dispatcher(world) as fleet:
        kept, other = (fleet.hire(NEED, furnish, 1.0, content)[0] for _ in range(2))
        other.ban("no matter why")
        fleet.close([kept.record.label])
        assert list(world.market.leases) == [kept.record.instance]
        assert [record.state for record in records(world)] == ["ready", "destroyed"]


def full(*_, **__) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["damaged", "full"])
def test_a_ledger_that_fails_keeps_no_machine_alive(world, monkeypatch, trouble):
    with dispatcher(world) as fleet:
        rental, _ = fleet.hire(NEED, furnish, 1.0, content)
        if trouble == "damaged":
            (fleet.desk.ledger.folder / f"{rental.record.label[-12:]}.rental.json").write_text("{")
        else:
            monkeypatch.setattr("tempfile.mkstemp", full)
        with pytest.raises(UserError, match=r"rental\.json cannot be (read|written)"):
            fleet.close()
    assert not world.market.leases


@pytest.mark.parametrize("trouble", ["damaged", "full"])
def test_reap_ends_machines_whose_ledger_fails(world, monkeypatch, capsys, trouble):
    with dispatcher(world) as fleet:
        rental, instance = fleet.hire(NEED, furnish, 1.0, content)
    if trouble == "damaged":
        (world.folder / "toy" / f"{rental.record.label[-12:]}.rental.json").write_text("{")
    else:
        monkeypatch.setattr("tempfile.mkstemp", full)
    verb(world, monkeypatch, "--now")
    assert not world.market.leases
    out = capsys.readouterr().out
    assert "json cannot be" in out
    assert f"machine {instance.id}: destroyed" in out


def test_nothing_is_rented_after_the_end_has_begun(world):
    """Of a worker whose request is on its way when the run ends: it is waited for, and none follows."""
    asked, answered = threading.Event(), threading.Event()
    create = world.fake._create

    def slow(*arguments):
        asked.set()
        assert answered.wait(10)
        return create(*arguments)

    with dispatcher(world) as fleet:
        offers = fleet.desk.account.search({}, 40.0, False)
        slowly, late = [Rental.intend(fleet.desk, offer, Price(0.45, 0.0, None), 40.0, 0.6) for offer in offers[:2]]
        world.fake._create = slow
        worker = threading.Thread(target=slowly.create, args=(CONTAINER,))
        worker.start()
        assert asked.wait(10)
        threading.Timer(0.2, answered.set).start()
        fleet.close()
        worker.join()
        with pytest.raises(NotRented, match="the run is ending"):
            late.create(CONTAINER)
    assert world.count("create") == 1
    assert not world.market.leases


def test_two_workers_do_not_take_the_same_offer(world, monkeypatch):
    with dispatcher(world) as fleet:
        found = list(fleet._offers(NEED, []))[:2]
        fleet.hire(NEED, furnish, 1.0, content)
        monkeypatch.setattr(fleet, "_offers", lambda need, failures: iter(found))  # what another one saw just before
        rental, _ = fleet.hire(NEED, furnish, 1.0, content)
        assert rental.record.offer == found[1][0].id
        assert [record.ban for record in records(world)] == ["", ""]


def test_a_machine_left_over_that_resists_keeps_no_other_from_its_work(world):
    with dispatcher(world) as fleet:
        good, _ = fleet.hire(NEED, furnish, 1.0, content)
        stuck, _ = fleet.hire(NEED, furnish, 1.0, content)
        world.market.leases[stuck.record.instance].fate.destroy_refusals = float("inf")
        stuck._move("destroying")
    said = []
    with dispatcher(world) as fleet:
        fleet.say = said.append
        assert [one.record.label for one in fleet.recover()] == [good.record.label]
        assert "MAY STILL BE RUNNING" in said[-1]
        with pytest.raises(Unconfirmed):
            fleet.close()
    assert list(world.market.leases) == [stuck.record.instance]


def test_what_is_written_down_while_a_reaper_looks_is_not_sent(world, monkeypatch):
    """It ends the run between the check and the writing, and may not see what is written."""
    with dispatcher(world) as fleet:
        write = fleet.desk.ledger.write
        monkeypatch.setattr(fleet.desk.ledger, "write", lambda record: (fleet.desk.ledger.end(), write(record))[1])
        with pytest.raises(UserError, match="ended by reap"):
            fleet.hire(NEED, furnish, 1.0, content)
    assert world.count("create") == 0
    assert [record.state for record in records(world)] == ["refused"]


def test_reap_needs_no_ledger(world):
    leases = [
        world.market.create(world.market.hosts[0], {"label": label, "disk": 1})
        for label in ("sparse-coding.a.01", "sparse-coding.b.02", "mine", "sparse-codings.a.01")
    ]
    outcome = reaping.reap(world.account, world.clock, world.folder, run="b")
    assert outcome.confirmed
    assert outcome.destroyed == {leases[1].id}
    assert reaping.reap(world.account, world.clock, world.folder).destroyed == {leases[0].id}
    assert sorted(world.market.leases) == [leases[2].id, leases[3].id]


def test_reap_finds_a_machine_whose_label_was_changed(world):
    with dispatcher(world) as fleet:
        _, instance = fleet.hire(NEED, furnish, 1.0, content)
    world.market.leases[instance.id].label = "renamed in the console"
    assert reaping.reap(world.account, world.clock, world.folder).destroyed == {instance.id}
    assert records(world)[0].state == "destroyed"


def test_reap_waits_for_a_request_without_an_answer(world):
    world.market.hosts[0].fate.hidden_for = 50
    with dispatcher(world) as fleet:
        world.fake.fail_next("create", Fault(502, after=True))
        monkey = Rental.settle
        try:
            Rental.settle = lambda self: False  # killed before it could look
            with pytest.raises(NoMachine):
                fleet.hire(NEED, furnish, 1.0, content, attempts=1)
        finally:
            Rental.settle = monkey
    assert records(world)[0].state == "intended"
    assert reaping.reap(world.account, world.clock, world.folder).confirmed
    assert not world.market.leases
    assert records(world)[0].state == "destroyed"


def test_reap_stops_a_dispatcher_that_is_at_work(world):
    with dispatcher(world) as fleet:
        fleet.hire(NEED, furnish, 1.0, content)
        said = []
        assert reaping.reap(world.account, world.clock, world.folder, say=said.append).confirmed
        assert not world.market.leases
        assert "another dispatcher" in said[0]
        with pytest.raises(UserError, match="ended by reap"):
            fleet.hire(NEED, furnish, 1.0, content)
        fleet.close()
    assert all(record.over for record in records(world))


def verb(world, monkeypatch, *words: str) -> None:
    monkeypatch.setenv("VAST_URL", in_process(world.fake, monkeypatch))
    monkeypatch.setenv("VAST_API_KEY", KEY)
    monkeypatch.setenv("VAST_UTILS_STATE", str(world.folder))
    monkeypatch.setattr(reaping, "SafeClock", lambda floor: world.clock)
    reaping.main(words)


@pytest.mark.parametrize("words", [[], ["--now"]])
def test_the_verb_says_what_it_did(world, monkeypatch, capsys, words):
    rescued = []
    monkeypatch.setattr(reaping, "rescue", lambda ledger, account: rescued.append(ledger.run) or {})
    with dispatcher(world) as fleet:
        _, instance = fleet.hire(NEED, furnish, 1.0, content)
    verb(world, monkeypatch, *words)
    assert rescued == ([] if words else ["toy"])
    out = capsys.readouterr().out
    assert f"machine {instance.id}: destroyed" in out
    assert "nothing of ours is left" in out
    with pytest.raises(UserError, match="is named"):
        verb(world, monkeypatch, "--run", "No Run")


def test_the_verb_keeps_what_does_not_fit_here_and_ends_the_rest(world, monkeypatch, capsys):
    with dispatcher(world) as fleet:
        kept, other = (fleet.hire(NEED, furnish, 1.0, content)[0] for _ in range(2))
    why = {kept.record.label: "run-0 has results that do not fit here"}
    monkeypatch.setattr(reaping, "rescue", lambda ledger, account: why)
    with pytest.raises(SystemExit) as stop:
        verb(world, monkeypatch)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [*why.values(), "reap --now destroys them all the same"]
    assert captured.out == f"machine {other.record.instance}: destroyed\n"
    assert list(world.market.leases) == [kept.record.instance]
    verb(world, monkeypatch, "--now")
    assert not world.market.leases


def test_the_verb_is_loud_and_fails_where_it_cannot_be_sure(world, monkeypatch, capsys):
    world.market.hosts[0].fate.destroy_refusals = float("inf")
    with dispatcher(world) as fleet:
        _, instance = fleet.hire(NEED, furnish, 1.0, content)
    with pytest.raises(SystemExit) as stop:
        verb(world, monkeypatch)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert str(instance.id) in captured.err
    assert "https://cloud.vast.ai/instances/" in captured.err
    assert "nothing of ours is left" not in captured.out
    assert records(world)[0].state == "ready"
