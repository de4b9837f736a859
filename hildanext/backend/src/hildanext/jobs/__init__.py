"""Background jobs: a table of them in SQLite, a process for each, and what can be seen of one.

`service.JobService` is what others use. It knows no stage: what may be submitted, and how it is checked, is handed in
(`hildanext.stages.submission.open_jobs` does so for the stages of a recipe). Nothing here imports torch.

    jobs = JobService(folder, kinds=..., check=..., limit=1)
    jobs.start(); jobs.stop()                   the supervisor's thread; workers outlive it
    jobs.submit(kind, config) -> Job            `ConfigError`, `UnknownChoice` (400), `JobsFull` (503)
    jobs.list(limit=50, before=None, state=None) -> list[Job]        newest first; `before` is an id
    jobs.counts() -> dict                       jobs by state
    jobs.get(id) -> Job                         `UnknownJob` (404), here and below
    jobs.cancel(id) -> Job                      `JobConflict` (409) for a job that has ended otherwise
    jobs.events(id, after=0, limit=1000) -> list[JobEvent]           oldest first, ids greater than `after`
    jobs.follow(id, after=0, stopped=None) -> Iterator[JobEvent]     blocks; ends when the job has ended
    jobs.outcomes(id) -> dict                   what its finished stages returned, by key
    jobs.log(id) -> str                         the last part of what its process printed
    jobs.artefacts(id) -> list[Artefact]
    jobs.artefact(id, name) -> Path             a real file inside the job's folder; `ArtefactError` (404)

All methods may be called from any thread, and from several processes on one folder.
"""
