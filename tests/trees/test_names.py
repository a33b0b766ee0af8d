"""Names: one identity for a leaf across containers, and a way back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchjax import trees
from patchjax.trees.errors import StructureError
from tests import containers

PARTS = st.lists(
  st.text(st.characters(codec="utf-8"), max_size=5)
  | st.sampled_from(["", "~", "/", "~1", "~0", "~2", "a.b", "value", "0"]),
  min_size=1,
  max_size=4,
)


@given(PARTS)
def test_split_is_the_inverse_of_join(parts):
  assert trees.split(trees.join(parts)) == tuple(parts)


@given(PARTS, PARTS)
def test_different_names_have_different_texts(a, b):
  assert (trees.join(a) == trees.join(b)) == (a == b)


@pytest.mark.parametrize("text", ["a~", "a/~3", "~", "a~2", "a//b"])
def test_split_refuses_what_join_never_writes(text):
  with pytest.raises(StructureError, match="not a leaf name"):
    trees.split(text)


@pytest.mark.parametrize("container", containers.SHARED)
def test_every_container_has_the_same_names_and_comes_back(container):
  tree = containers.SHARED[container]()
  named, treedef = trees.flatten(tree)
  assert sorted(named) == sorted(containers.NAMES)
  for name, leaf in named.items():
    np.testing.assert_array_equal(leaf, containers.leaf(name))
  back = jax.tree.unflatten(treedef, named.values())
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  assert type(back) is type(tree)


@pytest.mark.parametrize("source", ["pure_dict", "nnx_state", "equinox_module"])
@pytest.mark.parametrize("target", containers.SHARED)
def test_leaves_of_one_container_go_into_another_by_name(source, target):
  new = trees.named_leaves(containers.SHARED[source](1000.0))
  named, treedef = trees.flatten(containers.SHARED[target]())
  back = jax.tree.unflatten(treedef, [new[name] for name in named])
  assert jax.tree.structure(back) == treedef
  for name, leaf in trees.named_leaves(back).items():
    np.testing.assert_array_equal(leaf, containers.leaf(name, 1000.0))


def test_boxes_keep_their_metadata():
  tree = containers.linen_boxed()
  named, treedef = trees.flatten(tree)
  back = jax.tree.unflatten(treedef, named.values())
  assert back["blocks"]["0"]["kernel"].names == (None, "model")


def test_linen_variables_are_named_as_their_module_names_them():
  from flax import linen as nn

  variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
  assert set(trees.named_leaves(variables)) == {"params/kernel", "params/bias"}


def test_haiku_names_keep_their_slashes_in_one_part():
  import haiku as hk

  f = hk.transform(lambda x: hk.nets.MLP([2], name="mlp")(x))
  params = f.init(jax.random.PRNGKey(0), jnp.ones((1, 3)))
  named = trees.named_leaves(params)
  assert {trees.split(name) for name in named} == {
    ("mlp/~/linear_0", "w"),
    ("mlp/~/linear_0", "b"),
  }
  assert jax.tree.structure(trees.nested(named)) == jax.tree.structure(params)


def test_an_equinox_model_with_functions_inside_comes_back():
  import equinox as eqx

  model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
  named, treedef = trees.flatten(model)
  assert "layers/0/weight" in named
  back = jax.tree.unflatten(treedef, named.values())
  assert eqx.tree_equal(back, model)


def test_optax_states_have_names():
  state = optax.adam(0.1).init({"w": jnp.ones(2)})
  named = trees.named_leaves(state)
  assert set(named) == {"0/count", "0/mu/w", "0/nu/w"}


def test_a_value_attribute_with_siblings_is_kept():
  @jax.tree_util.register_pytree_with_keys_class
  class Pair:
    def __init__(self, value, scale):
      self.value, self.scale = value, scale

    def tree_flatten_with_keys(self):
      key = jax.tree_util.GetAttrKey
      return ((key("value"), self.value), (key("scale"), self.scale)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
      return cls(*children)

  assert set(trees.named_leaves({"w": Pair(1.0, 2.0)})) == {
    "w/value",
    "w/scale",
  }
  # A dict's key "value" is a name like any other.
  assert set(trees.named_leaves({"w": {"value": 1.0}})) == {"w/value"}


@pytest.mark.parametrize(
  "tree",
  [
    # Orbax confuses the first two, keystr(simple=True) the third.
    {"a.b": 1.0, "a": {"b": 2.0}},
    {"a/b": 1.0, "a": {"b": 2.0}},
    {"a~1b": 1.0, "a/b": 2.0},
    {"": 1.0, "~2": 2.0},
  ],
)
def test_dots_slashes_and_tildes_never_collide(tree):
  named, treedef = trees.flatten(tree)
  assert len(named) == 2
  assert jax.tree.unflatten(treedef, named.values()) == tree
  assert trees.nested(named) == tree


def test_nested_refuses_a_leaf_that_is_also_a_parent():
  for names in (["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]):
    with pytest.raises(StructureError, match="also holds others"):
      trees.nested(dict.fromkeys(names, 1.0))


def test_an_ambiguous_tree_is_refused_with_both_paths():
  @jax.tree_util.register_pytree_with_keys_class
  class Mixed:
    def __init__(self, *leaves):
      self.leaves = leaves

    def tree_flatten_with_keys(self):
      keys = (jax.tree_util.DictKey(1), jax.tree_util.DictKey("1"))
      return tuple(zip(keys, self.leaves, strict=True)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
      return cls(*children)

  with pytest.raises(StructureError, match=r"share a name\n  1: \[1\], "):
    trees.named_leaves(Mixed(1.0, 2.0))


def test_abstract_leaves_have_names_too():
  tree = jax.eval_shape(lambda: containers.pure_dict())
  assert set(trees.named_leaves(tree)) == set(containers.NAMES)
