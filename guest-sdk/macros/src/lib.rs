//! The attribute macro of guest-sdk: `#[entry]`.

use proc_macro::TokenStream;
use quote::quote;
use syn::{ItemFn, ReturnType, Type, Visibility};

const RULE: &str = "#[entry] goes on `fn main()` or `fn main(domain: Domain)`, also async, with no result, `!` or `Result<(), E>`";

/// Makes a function the first one of the guest to run.
///
/// It takes nothing or the [`Domain`](../guest_sdk/struct.Domain.html), may be `async`, and returns nothing, `!` or a
/// `Result` whose error has `Debug`. When it returns, the domain powers off; an error makes it crash with the error
/// printed. The attribute also puts into the program what only a guest image may hold: ELF notes, the panic handler, the
/// heap and the memory functions the compiler calls.
#[proc_macro_attribute]
pub fn entry(arguments: TokenStream, item: TokenStream) -> TokenStream {
    expand(arguments.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

fn expand(
    arguments: proc_macro2::TokenStream,
    item: proc_macro2::TokenStream,
) -> syn::Result<proc_macro2::TokenStream> {
    if !arguments.is_empty() {
        return Err(syn::Error::new_spanned(arguments, "#[entry] takes no arguments"));
    }
    let whole = item.clone();
    let function: ItemFn = syn::parse2(item).map_err(|_| syn::Error::new_spanned(whole, RULE))?;
    let signature = &function.sig;
    let plain = signature.constness.is_none()
        && signature.unsafety.is_none()
        && signature.abi.is_none()
        && signature.generics.params.is_empty()
        && signature.generics.where_clause.is_none()
        && signature.variadic.is_none()
        && signature.inputs.len() <= 1
        && !matches!(signature.inputs.first(), Some(syn::FnArg::Receiver(_)))
        && matches!(function.vis, Visibility::Inherited);
    if !plain {
        return Err(syn::Error::new_spanned(signature, RULE));
    }
    let name = &signature.ident;
    let call = if signature.inputs.is_empty() {
        quote!(#name())
    } else {
        quote!(#name(::guest_sdk::Domain::take().expect("nobody took the domain before main")))
    };
    let call =
        if signature.asyncness.is_some() { quote!(::guest_sdk::executor::block_on(#call)) } else { call };
    let body = match &signature.output {
        ReturnType::Type(_, kind) if matches!(**kind, Type::Never(_)) => quote!(#call),
        _ => quote!(::guest_sdk::rt::finish(#call)),
    };
    Ok(quote! {
        #function

        ::guest_sdk::__runtime!();

        #[doc(hidden)]
        #[unsafe(no_mangle)]
        extern "C" fn __guest_main() -> ! {
            #body
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{RULE, expand};
    use quote::quote;

    fn message(item: proc_macro2::TokenStream) -> Option<String> {
        expand(quote!(), item).err().map(|error| error.to_string())
    }

    #[test]
    fn right_signatures_pass() {
        for item in [
            quote!(
                fn main() {}
            ),
            quote!(
                fn main(domain: Domain) {}
            ),
            quote!(
                fn main(domain: Domain) -> ! {
                    loop {}
                }
            ),
            quote!(
                async fn main(domain: Domain) -> Result<(), Errno> {
                    Ok(())
                }
            ),
        ] {
            assert_eq!(message(item), None);
        }
    }

    #[test]
    fn wrong_signatures_are_refused_in_one_sentence() {
        for item in [
            quote!(
                struct Main;
            ),
            quote!(
                unsafe fn main() {}
            ),
            quote!(
                const fn main() {}
            ),
            quote!(
                extern "C" fn main() {}
            ),
            quote!(
                fn main<T>(domain: T) {}
            ),
            quote!(
                fn main(a: Domain, b: Domain) {}
            ),
            quote!(
                pub fn main() {}
            ),
            quote!(
                fn main(self) {}
            ),
        ] {
            assert_eq!(message(item).as_deref(), Some(RULE));
        }
    }

    #[test]
    fn arguments_are_refused() {
        let error = expand(
            quote!(fast),
            quote!(
                fn main() {}
            ),
        )
        .err()
        .map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("#[entry] takes no arguments"));
    }
}
