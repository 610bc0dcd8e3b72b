//! Compares two maps in one pass.

use std::collections::BTreeMap;

/// Returns the keys of both maps in order, each with its value in either map. One pass over both maps is many
/// times faster than looking up each key, which matters where maps of all services are compared at every
/// change.
pub fn join<'a, K: Ord, A, B>(
    before: &'a BTreeMap<K, A>,
    now: &'a BTreeMap<K, B>,
) -> impl Iterator<Item = (&'a K, Option<&'a A>, Option<&'a B>)> {
    let (mut before, mut now) = (before.iter().peekable(), now.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (before.peek(), now.peek()) {
            (Some((old, _)), Some((new, _))) => old.cmp(new),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, _) => std::cmp::Ordering::Greater,
        };
        let old = if order.is_le() { before.next() } else { None };
        let new = if order.is_ge() { now.next() } else { None };
        let key = old.map(|(key, _)| key).or(new.map(|(key, _)| key))?;
        Some((key, old.map(|(_, value)| value), new.map(|(_, value)| value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_comes_once_and_in_order_with_what_both_have() {
        let before = BTreeMap::from([(1, 'a'), (2, 'b'), (5, 'e')]);
        let now = BTreeMap::from([(0, "x"), (2, "y"), (6, "z"), (7, "w")]);
        let joined: Vec<_> = join(&before, &now).map(|(k, a, b)| (*k, a.copied(), b.copied())).collect();
        let expected = [
            (0, None, Some("x")),
            (1, Some('a'), None),
            (2, Some('b'), Some("y")),
            (5, Some('e'), None),
            (6, None, Some("z")),
            (7, None, Some("w")),
        ];
        assert_eq!(joined, expected);
        assert_eq!(join(&BTreeMap::<u8, ()>::new(), &BTreeMap::<u8, ()>::new()).count(), 0);
    }
}
