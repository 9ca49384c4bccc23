"""Writes small models with random weights as GGUF files.

    models.py FOLDER            the models of the tests: llama, alibi, sinks, softcap, mla
    models.py FOLDER --bench    one in which attention is most of the work

Every model has 256 tokens and no tokenizer. Weights are scaled so that scores and logits have a spread of about 1: attention
then neither averages over all keys nor sees one alone, and no token is certain.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

VOCABULARY = 256


class Model:
    """A GGUF file in the making; `name` seeds the weights, so that every run makes the same file."""

    def __init__(self, path, arch, layers, embedding, context, dtype=np.float32):
        self.writer = gguf.GGUFWriter(path, arch)
        self.random = np.random.default_rng(sum(arch.encode()))
        self.dtype = dtype
        self.layers, self.embedding = layers, embedding
        self.writer.add_context_length(context)
        self.writer.add_embedding_length(embedding)
        self.writer.add_block_count(layers)
        self.writer.add_tokenizer_model("none")
        self.writer.add_vocab_size(VOCABULARY)

    def vector(self, name, size, mean=1.0, spread=0.1):
        values = mean + spread * self.random.standard_normal(size)
        self.writer.add_tensor(name, values.astype(np.float32))

    def matrix(self, name, *shape, gain=1.0):
        """`shape` as numpy counts it: the last dimension is the one that is summed over."""
        values = self.random.standard_normal(shape, dtype=np.float32) * (gain / np.sqrt(shape[-1]))
        self.writer.add_tensor(name, values.astype(self.dtype))

    def ends(self, tied=False):
        self.matrix("token_embd.weight", VOCABULARY, self.embedding, gain=np.sqrt(self.embedding))
        self.vector("output_norm.weight", self.embedding)
        if not tied:
            self.matrix("output.weight", VOCABULARY, self.embedding)

    def heads(self, query, key_value, dim, dim_v=None):
        self.writer.add_head_count(query)
        self.writer.add_head_count_kv(key_value)
        self.writer.add_key_length(dim)
        self.writer.add_value_length(dim_v or dim)

    def attention(self, layer, query, key_value, dim):
        block = f"blk.{layer}"
        self.vector(f"{block}.attn_norm.weight", self.embedding)
        self.matrix(f"{block}.attn_q.weight", query * dim, self.embedding, gain=1.5)
        self.matrix(f"{block}.attn_k.weight", key_value * dim, self.embedding)
        self.matrix(f"{block}.attn_v.weight", key_value * dim, self.embedding)
        self.matrix(f"{block}.attn_output.weight", self.embedding, query * dim)

    def feed_forward(self, layer, size):
        block = f"blk.{layer}"
        self.vector(f"{block}.ffn_norm.weight", self.embedding)
        self.matrix(f"{block}.ffn_gate.weight", size, self.embedding)
        self.matrix(f"{block}.ffn_up.weight", size, self.embedding)
        self.matrix(f"{block}.ffn_down.weight", self.embedding, size)

    def write(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def llama(path, layers=2, embedding=128, query=8, key_value=2, dim=64, feed_forward=64, context=1024, dtype=np.float32):
    """Grouped heads and rotary positions."""
    model = Model(path, "llama", layers, embedding, context, dtype)
    model.heads(query, key_value, dim)
    model.writer.add_feed_forward_length(feed_forward)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_rope_dimension_count(dim)
    model.ends()
    for layer in range(layers):
        model.attention(layer, query, key_value, dim)
        model.feed_forward(layer, feed_forward)
    model.write()


def alibi(path, layers=2, heads=6, dim=64, feed_forward=64):
    """MPT: a slope for each head times the distance of the key; six heads, so that both kinds of slope occur."""
    embedding = heads * dim
    model = Model(path, "mpt", layers, embedding, 1024)
    model.writer.add_head_count(heads)
    model.writer.add_feed_forward_length(feed_forward)
    model.writer.add_layer_norm_eps(1e-5)
    model.writer.add_max_alibi_bias(8.0)
    model.ends()
    for layer in range(layers):
        block = f"blk.{layer}"
        model.vector(f"{block}.attn_norm.weight", embedding)
        model.matrix(f"{block}.attn_qkv.weight", 3 * embedding, embedding, gain=1.2)
        model.matrix(f"{block}.attn_output.weight", embedding, embedding)
        model.vector(f"{block}.ffn_norm.weight", embedding)
        model.matrix(f"{block}.ffn_up.weight", feed_forward, embedding)
        model.matrix(f"{block}.ffn_down.weight", embedding, feed_forward)
    model.write()


def sinks(path, layers=2, embedding=128, query=8, key_value=2, dim=64, feed_forward=64, experts=2):
    """gpt-oss: sinks, and a window of 64 keys in every second layer. All experts are used: none is chosen by a hair."""
    model = Model(path, "gpt-oss", layers, embedding, 1024)
    model.heads(query, key_value, dim)
    model.writer.add_feed_forward_length(feed_forward)
    model.writer.add_expert_feed_forward_length(feed_forward)
    model.writer.add_expert_count(experts)
    model.writer.add_expert_used_count(experts)
    model.writer.add_sliding_window(64)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_rope_dimension_count(dim)
    model.ends()
    for layer in range(layers):
        block = f"blk.{layer}"
        model.attention(layer, query, key_value, dim)
        model.vector(f"{block}.attn_output.bias", embedding, mean=0)
        model.vector(f"{block}.attn_sinks.weight", query, mean=1, spread=2)
        model.vector(f"{block}.post_attention_norm.weight", embedding)
        model.matrix(f"{block}.ffn_gate_inp.weight", experts, embedding)
        model.vector(f"{block}.ffn_gate_inp.bias", experts, mean=0)
        for name in ("gate", "up"):
            model.matrix(f"{block}.ffn_{name}_exps.weight", experts, feed_forward, embedding)
            model.vector(f"{block}.ffn_{name}_exps.bias", (experts, feed_forward), mean=0)
        model.matrix(f"{block}.ffn_down_exps.weight", experts, embedding, feed_forward)
        model.vector(f"{block}.ffn_down_exps.bias", (experts, embedding), mean=0)
    model.write()


def softcap(path, layers=2, embedding=128, query=4, key_value=2, dim=128, feed_forward=64):
    """Gemma 2: scores are capped, and every second layer has a window."""
    model = Model(path, "gemma2", layers, embedding, 1024)
    model.heads(query, key_value, dim)
    model.writer.add_feed_forward_length(feed_forward)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_rope_dimension_count(dim)
    model.writer.add_sliding_window(64)
    model.writer.add_attn_logit_softcapping(2.0)
    model.ends(tied=True)
    for layer in range(layers):
        block = f"blk.{layer}"
        model.attention(layer, query, key_value, dim)
        model.vector(f"{block}.post_attention_norm.weight", embedding)
        model.feed_forward(layer, feed_forward)
        model.vector(f"{block}.post_ffw_norm.weight", embedding)
    model.write()


def mla(path, layers=2, embedding=128, heads=4, rank=512, rope=64, nope=32, value=64, rank_q=64, feed_forward=64):
    """DeepSeek 2: one key and value head, 576 wide for scores; values are the first 512 of the keys."""
    model = Model(path, "deepseek2", layers, embedding, 1024)
    model.heads(heads, 1, rank + rope, rank)
    model.writer.add_key_length_mla(nope + rope)
    model.writer.add_value_length_mla(value)
    model.writer.add_q_lora_rank(rank_q)
    model.writer.add_kv_lora_rank(rank)
    model.writer.add_feed_forward_length(feed_forward)
    model.writer.add_leading_dense_block_count(layers)
    model.writer.add_expert_feed_forward_length(feed_forward)
    model.writer.add_expert_shared_count(0)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_rope_dimension_count(rope)
    model.ends()
    for layer in range(layers):
        block = f"blk.{layer}"
        model.vector(f"{block}.attn_norm.weight", embedding)
        model.matrix(f"{block}.attn_q_a.weight", rank_q, embedding)
        model.vector(f"{block}.attn_q_a_norm.weight", rank_q)
        model.matrix(f"{block}.attn_q_b.weight", heads * (nope + rope), rank_q, gain=1.5)
        model.matrix(f"{block}.attn_kv_a_mqa.weight", rank + rope, embedding)
        model.vector(f"{block}.attn_kv_a_norm.weight", rank)
        model.matrix(f"{block}.attn_k_b.weight", heads, rank, nope, gain=0.5)
        model.matrix(f"{block}.attn_v_b.weight", heads, value, rank)
        model.matrix(f"{block}.attn_output.weight", embedding, heads * value)
        model.feed_forward(layer, feed_forward)
    model.write()


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if "--bench" in sys.argv[2:]:
        llama(folder / "bench.gguf", layers=4, embedding=512, query=32, key_value=8, dim=128, feed_forward=64,
              context=1 << 18, dtype=np.float16)
        return
    for make in (llama, alibi, sinks, softcap, mla):
        make(folder / f"{make.__name__}.gguf")


if __name__ == "__main__":
    main()
