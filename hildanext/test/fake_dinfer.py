"""dInfer's published interface without its models: the same names, signatures and quirks, for the adapter's tests.

As the real one at the pinned commit: a server for each process (`handle`), groups of workers that are known before
they are started, workers that are asked through queues whose answers are waited for without end, whole blocks, a stop
behind the block that holds an end of text (the prompt's last block, too), every end of text taken out of the row,
forwards counted over all calls, and a stop that waits for its workers. What the workers write is the test's.
"""

import multiprocessing
import queue
import threading
import time

script = {"write": None, "behaviour": "well", "forwards": 3, "seconds": 0.0}
"""`write(position) -> token`; behaviour: well, hangs, dies, raises, half or child; forwards of a block; seconds of a
call."""
made = []
"""Arguments of every server that was started."""
asked = []
"""Rows, lengths and block lengths of every call that reached a worker."""


class SamplingParams:
    def __init__(self, threshold=0.9, low_threshold=0.6, cache='dual', temperature=0., early_stop=True, cont_weight=0.3,
            prefix_look=16, after_look=16, warmup_steps=4, enable_torch_compile=True, mask_id=156895, eos_id=156892,
            parallel_decoding='threshold', use_credit=False, use_bd=True, max_length=4096):  # fmt: skip
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})


def generate(row, gen_length, block_length, write, eos_id, forwards):
    """The row that comes back, and the forwards it took, for early stop and blocks."""
    total = -(-(len(row) + gen_length) // block_length) * block_length
    data = row + [write(position) for position in range(len(row), total)]
    taken = 1  # the prefill
    for start in range(len(row) // block_length * block_length, total, block_length):
        end = start + block_length
        taken += forwards
        if eos_id in data[start:end]:
            data[end:] = [eos_id] * (total - end)
            break
    return [token for token in data if token != eos_id], taken


class Worker(threading.Thread):
    """Stands in for a process: alive, until it is told to stop, ended, or dies."""

    def __init__(self, requests, results, params):
        super().__init__(daemon=True)
        self.requests, self.results, self.params = requests, results, params
        self.exitcode, self.ended, self.num_forwards = None, threading.Event(), 0

    def run(self):
        while not self.ended.is_set():
            try:
                data = self.requests.get(timeout=0.02)
            except queue.Empty:
                continue
            if data == "stop":
                return
            if script["behaviour"] == "dies":
                self.exitcode = 1
                return
            prompt, gen_length, block_length = data
            row = prompt[0].tolist()
            asked.append((row, gen_length, block_length))
            while script["behaviour"] == "hangs" and not self.ended.is_set():
                time.sleep(0.01)
            time.sleep(script["seconds"])
            tokens, taken = generate(
                row, gen_length, block_length, script["write"], self.params.eos_id, script["forwards"]
            )
            self.num_forwards += taken
            import torch

            self.results.put((torch.tensor([tokens]), self.num_forwards))

    def terminate(self):
        self.exitcode = -15
        self.ended.set()

    kill = terminate


class ServerGroup:
    def __init__(self):
        self.procs, self.req_qs, self.res_q = [], [], None

    def add_request(self, req):
        for requests in self.req_qs:
            requests.put(req)

    def get_response(self):
        return self.res_q.get()

    def start_server(self, model_path, model_type, sample_params, server_port, gpus, backend):
        if backend == "sglang":
            assert model_type.startswith("llada2")
        if script["behaviour"] == "child":  # the second GPU's fails: the first one's process is in no list yet
            child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
            child.start()
            raise OSError("no second process")
        requests, self.res_q = queue.Queue(), queue.Queue()
        self.procs, self.req_qs = [Worker(requests, self.res_q, sample_params)], [requests]
        self.procs[0].start()

    def stop_running(self):
        for requests in self.req_qs:
            requests.put("stop")
        for process in self.procs:
            process.join()


class ServerHandle:
    def __init__(self):
        self.groups = []

    def add_requests(self, reqs):
        prompts, gen_length, block_length = reqs
        assert len(self.groups) == prompts.shape[0], "We cannot only use DP to support batch size > 1."
        for group, prompt in zip(self.groups, prompts, strict=True):
            group.add_request((prompt.unsqueeze(0), gen_length, block_length))

    def get_responses(self):
        return [group.get_response() for group in self.groups]

    def start_server(self, model_path, model_type, sample_params, server_port, num_gpus, dp_size, tpep_size, backend):
        assert num_gpus >= dp_size * tpep_size
        for _ in range(dp_size):
            self.groups.append(ServerGroup())
            gpus = list(range(tpep_size))
            self.groups[-1].start_server(model_path, model_type, sample_params, server_port + 1, gpus, backend=backend)
        if script["behaviour"] == "half":
            raise RuntimeError("half started")

    def is_running(self):
        return len(self.groups) != 0

    def stop_running(self):
        for group in self.groups:
            group.stop_running()
        self.groups = []


handle = ServerHandle()


class DiffusionLLMServing:
    def __init__(self, model, model_type='llada2', sample_params=None, server_port=12345, num_gpus=None, dp_size=None, tpep_size=None, backend='sglang'):  # noqa: E501  # fmt: skip
        made.append({name: value for name, value in locals().items() if name != "self"})
        if script["behaviour"] == "raises":
            raise AssertionError("num_gpus")
        self.sample_params = sample_params
        if not handle.is_running():
            handle.start_server(model, model_type, sample_params, server_port, num_gpus, dp_size, tpep_size, backend)
        self.num_forwards = 0

    def generate(self, prompts, gen_length=128, block_length=128):
        handle.add_requests((prompts, gen_length, block_length))
        ((tokens, self.num_forwards),) = handle.get_responses()
        return tokens

    def stop_serving(self):
        handle.stop_running()
