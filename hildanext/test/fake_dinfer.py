"""dInfer's published interface without its models: the same names, signatures and quirks, for the adapter's tests.

As the real one at the pinned commit: a server for each process (`handle`), workers that are asked through queues whose
answers are waited for without end, whole blocks, every end of text taken out of the row, forwards counted over all
calls, and a stop that waits for its workers. What the workers write is the test's.
"""

import queue
import threading
import time

script = {"write": None, "behaviour": "well", "forwards": 3}
"""`write(prompt, length) -> tokens`; behaviour: well, hangs, dies or raises."""
made = []
"""Arguments of every server that was started."""


class SamplingParams:
    def __init__(self, threshold=0.9, low_threshold=0.6, cache='dual', temperature=0., early_stop=True, cont_weight=0.3,
            prefix_look=16, after_look=16, warmup_steps=4, enable_torch_compile=True, mask_id=156895, eos_id=156892,
            parallel_decoding='threshold', use_credit=False, use_bd=True, max_length=4096):  # fmt: skip
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})


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
            while script["behaviour"] == "hangs" and not self.ended.is_set():
                time.sleep(0.01)
            prompt, gen_length, block_length = data
            row = prompt[0].tolist()
            length = -(-(len(row) + gen_length) // block_length) * block_length - len(row)
            written = script["write"](row, length)
            eos = self.params.eos_id
            if eos in written:
                written = written[: written.index(eos)] + [eos] * (length - written.index(eos))
            self.num_forwards += script["forwards"]
            import torch

            self.results.put((torch.tensor([[token for token in row + written if token != eos]]), self.num_forwards))

    def terminate(self):
        self.exitcode = -15
        self.ended.set()

    kill = terminate


class ServerGroup:
    def __init__(self):
        self.procs, self.req_qs, self.res_q = [], [], None

    def get_response(self):
        return self.res_q.get()

    def start_server(self, params):
        requests, self.res_q = queue.Queue(), queue.Queue()
        self.procs, self.req_qs = [Worker(requests, self.res_q, params)], [requests]
        self.procs[0].start()

    def stop_running(self):
        for requests in self.req_qs:
            requests.put("stop")
        for process in self.procs:
            process.join()


class ServerHandle:
    def __init__(self):
        self.groups = []

    def is_running(self):
        return len(self.groups) != 0


handle = ServerHandle()


class DiffusionLLMServing:
    def __init__(self, model, model_type='llada2', sample_params=None, server_port=12345, num_gpus=None, dp_size=None, tpep_size=None, backend='sglang'):  # noqa: E501  # fmt: skip
        made.append({name: value for name, value in locals().items() if name != "self"})
        if script["behaviour"] == "raises":
            raise AssertionError("num_gpus")
        self.sample_params = sample_params
        if backend == "sglang":
            assert model_type.startswith("llada2")
        if not handle.is_running():
            handle.groups.append(ServerGroup())
            handle.groups[0].start_server(sample_params)
        self.num_forwards = 0

    def generate(self, prompts, gen_length=128, block_length=128):
        assert len(handle.groups) == prompts.shape[0]
        group = handle.groups[0]
        group.req_qs[0].put((prompts, gen_length, block_length))
        tokens, self.num_forwards = group.get_response()
        return tokens

    def stop_serving(self):
        for group in handle.groups:
            group.stop_running()
        handle.groups = []
