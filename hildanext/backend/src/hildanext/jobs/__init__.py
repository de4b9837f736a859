"""Background jobs: a table of them in SQLite, a process for each, and what can be seen of one.

`room.JobService` is the door. The room knows no stage: what may be submitted, and how it is checked, is handed in
(`hildanext.stages.submission.open_jobs` does so for the stages of a recipe). Nothing here imports torch.

    room = JobRoom(folder, kinds=..., check=..., limit=1)
    room.start(); room.stop()                   the supervisor's thread; workers outlive it
    room.submit(kind, config) -> Job            `ConfigError`, `UnknownChoice` (400), `JobsFull` (503)
    room.list(limit=50, before=None, state=None) -> list[Job]        newest first; `before` is an id
    room.counts() -> dict                       jobs by state
    room.get(id) -> Job                         `UnknownJob` (404), here and below
    room.cancel(id) -> Job                      `JobConflict` (409) for a job that has ended otherwise
    room.events(id, after=0, limit=1000) -> list[JobEvent]           oldest first, ids greater than `after`
    room.follow(id, after=0, stopped=None) -> Iterator[JobEvent]     blocks; ends when the job has ended
    room.outcomes(id) -> dict                   what its finished stages returned, by key
    room.log(id) -> str                         the last part of what its process printed
    room.artefacts(id) -> list[Artefact]
    room.artefact(id, name) -> Path             a real file inside the job's folder; `ArtefactError` (404)

All methods may be called from any thread, and from several processes on one folder.
"""
