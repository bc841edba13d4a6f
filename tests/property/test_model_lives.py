"""Random lives of a VM, with a service and a host that die at any moment, against what each state promises."""

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import sampled_from

from capsem.model.errors import WrongState
from capsem.model.lifecycle import LIVE, PUBLIC_STATUS, TRANSITIONS, Event, State, Status, recover, step

RESUMING = State.RESUMING


class Life(RuleBasedStateMachine):
    """The record says `state`; the model keeps what the world holds: files, a volume that was booted, a process."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State.CREATED
        self.process = False
        self.files = True

    @rule(event=sampled_from(Event))
    def anything(self, event: Event) -> None:
        """A request or a fact at a random moment: legal and followed, or refused without effect."""
        before = self.state
        if event not in TRANSITIONS[before]:
            with pytest.raises(WrongState):
                step(before, event)
            assert self.state is before
            return
        self.state = step(before, event)
        if event in (Event.START, Event.RESUME):
            assert not self.process, "one process a VM"
            self.process = True
        elif event in (Event.EXITED, Event.LOST, Event.SUSPENDED) or (event is Event.ABORTED and before is RESUMING):
            assert self.process
            self.process = False
        elif event is Event.ROLL_BACK:
            assert not self.process, "memory is never exchanged under a machine"
        elif event is Event.DELETE:
            assert not self.process, "files are never taken from under a process"
        elif event is Event.DELETED:
            self.files = False

    @rule()
    def service_restarts(self) -> None:
        """Whoever holds the claim is believed."""
        assert recover(self.state, supervisor_alive=self.process, same_host_boot=True) is self.state

    @precondition(lambda self: self.process)
    @rule(reboot=sampled_from([True, False]), saved=sampled_from([True, False]))
    def supervisor_is_killed(self, reboot: bool, saved: bool) -> None:
        before, self.process = self.state, False
        self.state = recover(before, supervisor_alive=False, same_host_boot=not reboot, saved=saved)
        if before is RESUMING or (before is State.SUSPENDING and saved):
            assert self.state is State.SUSPENDED
        else:
            assert self.state is (State.STOPPED if reboot else State.FAILED)

    @invariant()
    def the_record_tells_the_truth(self) -> None:
        assert (self.state in LIVE) == self.process
        assert (self.state is State.DELETED) == (not self.files)
        assert (PUBLIC_STATUS[self.state] is Status.RUNNING) == (self.process and self.state is not RESUMING)

    @invariant()
    def there_is_a_way_out(self) -> None:
        """Whatever happened, losing the process and deleting is always possible."""
        state = self.state
        if state in LIVE:
            state = step(state, Event.ABORTED if state is RESUMING else Event.LOST)
        if state not in (State.DELETING, State.DELETED):
            state = step(state, Event.DELETE)
        if state is State.DELETING:
            state = step(state, Event.DELETED)
        assert state is State.DELETED


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40)
