"""Task tree, cancel scopes, event feed and journal."""

from proxy.tasks.feed import EventPage
from proxy.tasks.status import Status
from proxy.tasks.task import Task
from proxy.tasks.tasks import JournalLimits, Tasks, open_tasks

__all__ = ["EventPage", "JournalLimits", "Status", "Task", "Tasks", "open_tasks"]
