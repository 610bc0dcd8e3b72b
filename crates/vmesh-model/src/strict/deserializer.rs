//! The serde deserializer of a tree: one node, with the entries of its mapping or the items of its list.

use std::cell::Cell;
use std::sync::Arc;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor};

use super::fault::{Fault, FaultKind};
use super::placeholder::Placeholder;
use super::{Repairs, one_of};
use crate::yaml::{Content, Entry, Node, short};

/// Deserializes one node.
#[derive(Clone, Copy)]
pub(super) struct NodeDeserializer<'a> {
    pub(super) node: &'a Node,
    pub(super) repairs: &'a Repairs,
    /// The field whose value is read.
    pub(super) field: Option<&'a str>,
}

impl<'a> NodeDeserializer<'a> {
    fn expected<T>(self, expected: impl Into<String>) -> Result<T, Fault> {
        let kind = FaultKind::Unexpected { expected: expected.into(), found: self.node.describe() };
        Err(Fault::new(kind).with_place(self.node))
    }

    /// Returns the text of a scalar, even if it looks like another type: `version: 1.10` is not a number.
    fn text(self) -> Result<&'a str, Fault> {
        match &self.node.content {
            Content::Scalar { text, .. } if !self.node.is_null() => Ok(text),
            _ => self.expected("a text"),
        }
    }

    fn unquoted(self) -> Option<&'a str> {
        match &self.node.content {
            Content::Scalar { text, is_quoted: false } => Some(text),
            _ => None,
        }
    }

    fn whole_number(self, min: i128, max: i128) -> Result<i128, Fault> {
        let digits = |text: &str| {
            let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
            digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'))
        };
        self.unquoted()
            .filter(|text| digits(text))
            .and_then(|text| text.parse::<i128>().ok())
            .filter(|number| (min..=max).contains(number))
            .map_or_else(|| self.expected(whole_numbers(min, max)), Ok)
    }

    /// Adds the place and a description of the node to an error of a visitor.
    fn located<T>(self, result: Result<T, Fault>) -> Result<T, Fault> {
        result.map_err(|mut fault| {
            if fault.0.at.is_none() {
                if let FaultKind::Unexpected { found, .. } = &mut fault.0.kind {
                    *found = self.node.describe();
                }
                if let (FaultKind::Message(message), Some(text)) = (&mut fault.0.kind, self.node.text()) {
                    // The standard library's error for an address does not quote it.
                    match message.as_str() {
                        "invalid socket address syntax" => {
                            *message = format!(
                                "`{}` is not an IP address and a port, such as 127.0.0.1:8080",
                                short(text)
                            );
                        }
                        "invalid IP address syntax" => {
                            *message = format!("`{}` is not an IP address", short(text))
                        }
                        _ => {}
                    }
                }
            }
            fault.with_place(self.node)
        })
    }
}

fn whole_numbers(min: i128, max: i128) -> String {
    match (min, max) {
        (0, max) if max > i128::from(u32::MAX) => "a whole number, 0 or more".to_owned(),
        (min, _) if min < i128::from(i32::MIN) => "a whole number".to_owned(),
        (min, max) => format!("a whole number from {min} to {max}"),
    }
}

macro_rules! whole_numbers {
    ($($method:ident $visit:ident $type:ty,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            let number = self.whole_number(<$type>::MIN.into(), <$type>::MAX.into())?;
            let Ok(number) = <$type>::try_from(number) else { return self.expected("a whole number") };
            let mut read: Result<V::Value, Fault> = visitor.$visit(number);
            // The standard library's error for a non-zero integer type is "a nonzero u16".
            if let Err(fault) = &mut read
                && let FaultKind::Unexpected { expected, .. } = &mut fault.0.kind
                && expected.contains("nonzero")
            {
                *expected = whole_numbers(1, <$type>::MAX.into());
            }
            self.located(read)
        }
    )*};
}

impl<'de> Deserializer<'de> for NodeDeserializer<'_> {
    type Error = Fault;

    /// Passes every scalar as text, so that quotes make no difference.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.content {
            Content::Scalar { .. } if self.node.is_null() => self.located(visitor.visit_unit()),
            Content::Scalar { text, .. } => self.located(visitor.visit_str(text)),
            Content::List(items) => self.located(visitor.visit_seq(ListAccess::new(self, items))),
            Content::Mapping(entries) => self.mapping(entries, visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.unquoted() {
            Some("true") => self.located(visitor.visit_bool(true)),
            Some("false") => self.located(visitor.visit_bool(false)),
            _ => self.expected("true or false"),
        }
    }

    whole_numbers! {
        deserialize_i8 visit_i8 i8,
        deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64,
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64,
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let number = |text: &str| text.parse::<f64>().ok().filter(|number| number.is_finite());
        match self.unquoted().and_then(number) {
            Some(number) => self.located(visitor.visit_f64(number)),
            None => self.expected("a number"),
        }
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.text()?;
        self.located(visitor.visit_str(text))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.node.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.node.is_null() { self.located(visitor.visit_unit()) } else { self.expected("nothing") }
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.located(visitor.visit_newtype_struct(self))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.node.items() {
            Some(items) => self.located(visitor.visit_seq(ListAccess::new(self, items))),
            None => self.expected("a list"),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.node.entries() {
            Some(entries) => self.mapping(entries, visitor),
            None => self.expected("a mapping"),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self.node.entries() {
            Some(entries) => self.mapping(entries, visitor),
            None => {
                let names: Vec<_> = fields.iter().map(|name| format!("`{name}`")).collect();
                self.expected(format!("a mapping of {}", names.join(", ")))
            }
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.node.content {
            Content::Scalar { .. } if !self.node.is_null() => self
                .located(visitor.visit_enum(EnumDeserializer { reader: self, name: self.node, value: None })),
            Content::Mapping(entries) => match entries.as_slice() {
                [Entry { key, value }] => {
                    let field = key.text();
                    let value = NodeDeserializer { node: value, repairs: self.repairs, field };
                    self.located(visitor.visit_enum(EnumDeserializer {
                        reader: self,
                        name: key,
                        value: Some(value),
                    }))
                }
                _ => {
                    let names: Vec<_> = entries.iter().map(Entry::name).collect();
                    let found = if names.is_empty() { "none".to_owned() } else { names.join(" and ") };
                    let expected = one_of(variants.iter().copied());
                    let kind = FaultKind::Unexpected { expected: format!("exactly {expected}"), found };
                    Err(Fault::new(kind).with_place(self.node))
                }
            },
            _ => self.expected(one_of(variants.iter().copied())),
        }
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }
}

impl<'a> NodeDeserializer<'a> {
    fn mapping<'de, V: Visitor<'de>>(self, entries: &'a [Entry], visitor: V) -> Result<V::Value, Fault> {
        let placeholders =
            self.repairs.placeholders.get(&self.node.id).map(Vec::as_slice).unwrap_or_default();
        let at_key = Cell::new(None);
        let access = MappingAccess {
            reader: self,
            rest: entries.iter().enumerate(),
            value: None,
            placeholders,
            at_key: &at_key,
        };
        visitor.visit_map(access).or_else(|mut fault| {
            // A hand-written visitor of keys reports an unknown field only after it has read the key as a
            // text.
            if let (None, FaultKind::UnknownField { name, .. }, Some((index, key))) =
                (&fault.0.at, &fault.0.kind, at_key.get())
                && key.text() == Some(name)
            {
                fault = fault.with_place(key).with_target(self.node.id, index, None);
            }
            self.located(Err(fault))
        })
    }
}

struct ListAccess<'a> {
    reader: NodeDeserializer<'a>,
    rest: std::iter::Enumerate<std::slice::Iter<'a, Arc<Node>>>,
}

impl<'a> ListAccess<'a> {
    fn new(reader: NodeDeserializer<'a>, items: &'a [Arc<Node>]) -> Self {
        ListAccess { reader, rest: items.iter().enumerate() }
    }
}

impl<'de> SeqAccess<'de> for ListAccess<'_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let NodeDeserializer { node: list, repairs, field } = self.reader;
        for (index, node) in self.rest.by_ref() {
            if !repairs.omitted.contains_key(&(list.id, index)) {
                let item = NodeDeserializer { node, repairs, field };
                let value = seed.deserialize(item);
                return value
                    .map(Some)
                    .map_err(|fault| fault.with_place(node).with_target(list.id, index, None));
            }
        }
        Ok(None)
    }
}

struct MappingAccess<'a> {
    reader: NodeDeserializer<'a>,
    rest: std::iter::Enumerate<std::slice::Iter<'a, Entry>>,
    /// The entry of the last key; `None` if the key is a placeholder.
    value: Option<(usize, &'a Entry)>,
    placeholders: &'a [&'static str],
    at_key: &'a Cell<Option<(usize, &'a Node)>>,
}

impl<'de> MapAccess<'de> for MappingAccess<'_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let NodeDeserializer { node: mapping, repairs, .. } = self.reader;
        for (index, entry) in self.rest.by_ref() {
            if !repairs.omitted.contains_key(&(mapping.id, index)) {
                self.value = Some((index, entry));
                self.at_key.set(Some((index, &entry.key)));
                let key = NodeDeserializer { node: &entry.key, repairs, field: None };
                let key = seed.deserialize(key);
                return key
                    .map(Some)
                    .map_err(|fault| fault.with_place(&entry.key).with_target(mapping.id, index, None));
            }
        }
        let Some((name, rest)) = self.placeholders.split_first() else { return Ok(None) };
        self.placeholders = rest;
        self.value = None;
        seed.deserialize(StrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let NodeDeserializer { node: mapping, repairs, .. } = self.reader;
        match self.value.take() {
            Some((index, entry)) => {
                let field = entry.key.text();
                let value = NodeDeserializer { node: &entry.value, repairs, field };
                seed.deserialize(value)
                    .map_err(|fault| fault.with_place(&entry.value).with_target(mapping.id, index, field))
            }
            None => seed
                .deserialize(Placeholder)
                .map_err(|_| Fault::new(FaultKind::Placeholder).with_place(mapping)),
        }
    }
}

/// The name of an enum variant, and its value.
struct EnumDeserializer<'a> {
    reader: NodeDeserializer<'a>,
    name: &'a Node,
    value: Option<NodeDeserializer<'a>>,
}

impl<'a> EnumDeserializer<'a> {
    fn value(self) -> Result<NodeDeserializer<'a>, Fault> {
        let name = self.name.text().unwrap_or_default();
        let lacking = || Fault::new(FaultKind::Message(format!("`{name}` needs a value: `{{{name}: ..}}`")));
        self.value.ok_or_else(lacking).map_err(|fault| fault.with_place(self.name))
    }
}

impl<'de, 'a> EnumAccess<'de> for EnumDeserializer<'a> {
    type Error = Fault;
    type Variant = EnumDeserializer<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Fault> {
        let name = NodeDeserializer { node: self.name, repairs: self.reader.repairs, field: None };
        Ok((seed.deserialize(name).map_err(|fault| fault.with_place(self.name))?, self))
    }
}

impl<'de> VariantAccess<'de> for EnumDeserializer<'_> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        match self.value {
            None => Ok(()),
            Some(_) => {
                let name = self.name.text().unwrap_or_default();
                Err(Fault::new(FaultKind::Message(format!("`{name}` takes no value: write only `{name}`")))
                    .with_place(self.name))
            }
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Fault> {
        let value = self.value()?;
        seed.deserialize(value).map_err(|fault| fault.with_place(value.node).with_field(value.field))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Fault> {
        let value = self.value()?;
        value.deserialize_tuple(len, visitor).map_err(|fault| fault.with_field(value.field))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let value = self.value()?;
        value.deserialize_struct("", fields, visitor).map_err(|fault| fault.with_field(value.field))
    }
}
