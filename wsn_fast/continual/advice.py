"""What the message of a ForgottenError advises, by when the change was found."""

from __future__ import annotations

from ..nn.task_ids import TaskId


def before_task() -> str:
    """The advice if a change is found when a task begins."""
    return (
        "They changed outside of any task: since the last one ended, or since the state was saved. No task was begun. "
        "Load a state of before the change. If the change is wanted (another dtype, for instance), "
        "WSN(model) makes a new WSN that takes the finished tasks as they are."
    )


def after_task(task: TaskId, guard_ran: bool) -> str:
    """The advice if a change is found when ``task`` ends."""
    if guard_ran:
        reason = (
            f"A guard ran in task {task!r}, so something that it does not see wrote to them: an optimizer that is not "
            "guarded (a copy of a guarded one is not), a wrapper around a guarded optimizer (guard the wrapper), an "
            "average of weights (use wsn_fast.optim.averaging), or an edit by hand."
        )
    else:
        reason = (
            f"No guard ran in task {task!r}. Call wsn.guard(optimizer) for every optimizer of this model before its "
            "first step."
        )
    return (
        f"{reason} Task {task!r} is still in progress, and its mask was not taken. Load a state of before the change, "
        "and train the task again from there."
    )
